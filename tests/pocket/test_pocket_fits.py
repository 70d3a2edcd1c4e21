"""Fits of the pocket parts: interrupted and resumed equals uninterrupted; the optimizer does what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from adapters.errors import FileError
from training.pocket.judging import Judge
from training.pocket.making import fit_base, fit_judge, fit_vae, model, ship
from training.pocket.making.fitting import MuonAdamW, _orthogonal, learning_rate


@pytest.fixture(autouse=True)
def _one_thread():
    """Bit-identity is asked of one machine; one thread keeps these small fits quick beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same(first, second) -> None:
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("fit", [fit_vae.fit, fit_judge.fit], ids=["vae", "judge"])
def test_resumed_equals_uninterrupted(fit, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit_judge, "accuracy", lambda *_: {})  # a report, no part of the fit
    monkeypatch.setattr(fit_vae, "psnr", lambda *_: 0.0)
    whole = fit(tmp_path / "whole", steps=4, batch=2)

    class Cut(Exception):
        pass

    modules = {"fit": __import__(fit.__module__, fromlist=["x"])}
    saved = modules["fit"].save_state
    calls = []

    def cut_after_saving(path, parts, emas, optimizer, step):
        saved(path, parts, emas, optimizer, step)
        calls.append(step)
        if len(calls) == 1:
            raise Cut

    monkeypatch.setattr(modules["fit"], "SAVE_EVERY", 2)
    monkeypatch.setattr(modules["fit"], "save_state", cut_after_saving)
    with pytest.raises(Cut):
        fit(tmp_path / "cut", steps=4, batch=2)
    same(fit(tmp_path / "cut", steps=4, batch=2), whole)
    assert calls == [2, 4]


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=model.CROSS_DIM,
        norm_num_groups=8,
    )


def test_a_resumed_base_fit_equals_an_uninterrupted_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit_base, "SHARD", 8)
    monkeypatch.setattr(model, "unet", small_unet)
    torch.manual_seed(0)
    vae = model.vae().eval()
    whole = fit_base.fit(vae, tmp_path / "a" / "base", steps=3, batch=4)
    fit_base.fit(vae, tmp_path / "b" / "base", steps=3, batch=4, stop_at=1)
    resumed = fit_base.fit(vae, tmp_path / "b" / "base", steps=3, batch=4)
    same(resumed.unet, whole.unet)
    same(resumed.text_encoder, whole.text_encoder)
    a, b = (load_file(tmp_path / name / "base" / "state.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def fit_small(folder: Path) -> fit_base.BaseParts:
    fit_base.SHARD, model.unet = 8, small_unet  # type: ignore[misc]
    torch.manual_seed(0)
    return fit_base.fit(model.vae().eval(), folder / "base", steps=3, batch=4)


SHARE = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from test_pocket_fits import fit_small
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
fit_small(folder)
"""


def test_two_processes_fit_as_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit_base, "SHARD", 8)  # put back afterwards
    monkeypatch.setattr(model, "unet", small_unet)
    fit_small(tmp_path / "one")
    both = tmp_path / "both"
    both.mkdir()
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.getcwd()])}
    workers = [subprocess.Popen([sys.executable, "-c", SHARE, str(both), rank], env=here) for rank in "01"]
    assert [worker.wait(300) for worker in workers] == [0, 0]
    one, shared = (load_file(folder / "base" / "state.safetensors") for folder in (tmp_path / "one", both))
    assert one.keys() == shared.keys()
    for name, value in one.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


def test_scenes_repeat_after_the_last_shard(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit_base, "SHARDS", 2)
    pieces = [torch.full((fit_base.SHARD, 1), float(index)) for index in range(2)]
    rows, _ = fit_base._rows(lambda index: {"latents": pieces[index], "tokens": pieces[index]}, range(4095, 4097))
    assert rows.flatten().tolist() == [1.0, 0.0]


def test_batches_may_straddle_shards(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fit_base, "SHARD", 8)
    torch.manual_seed(0)
    vae = model.vae().eval()
    rows, tokens = fit_base._rows(lambda index: fit_base.encoded_shard(vae, 1, index, tmp_path), range(5, 11))
    direct = fit_base._encode(vae, 1, range(5, 11)) * vae.config.scaling_factor
    assert torch.allclose(rows, direct.half().float(), atol=2e-3)
    assert tokens.shape == (6, 20)


def test_a_damaged_shard_is_made_again_and_a_damaged_state_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(fit_base, "SHARD", 8)
    monkeypatch.setattr(model, "unet", small_unet)
    torch.manual_seed(0)
    vae = model.vae().eval()
    made = fit_base.encoded_shard(vae, 1, 0, tmp_path / "latents")
    (file,) = (tmp_path / "latents").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    again = fit_base.encoded_shard(vae, 1, 0, tmp_path / "latents")
    assert "it is made again" in capsys.readouterr().out
    assert all(torch.equal(again[name], made[name]) for name in made)
    assert load_file(file).keys() == made.keys()
    fit_base.fit(vae, tmp_path / "base", steps=3, batch=4, stop_at=1)
    state = tmp_path / "base" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"state\.safetensors: the header describes"):
        fit_base.fit(vae, tmp_path / "base", steps=3, batch=4)


def test_what_ships_takes_the_old_one_s_place_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ship, "DATA", tmp_path)
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "README.md").write_text("card")
    (tmp_path / "judge" / "old").touch()

    def half(path: Path, tensors: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(ship.files, "write_tensors", half)
        with pytest.raises(OSError, match="No space"):
            ship.write_judge(Judge())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", "judge", "old"]
    ship.write_judge(Judge())
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["README.md", "judge", "judge.safetensors.xz"]


def test_muon_steps_are_orthogonal_and_embeddings_are_left_to_adam() -> None:
    torch.manual_seed(0)
    for shape in ((32, 96), (96, 32), (64, 64)):
        values = torch.linalg.svdvals(_orthogonal(torch.randn(shape)))
        assert values.min() > 0.4
        assert values.max() < 1.3
    network = torch.nn.Sequential(torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    muon, adam = (group["params"] for group in MuonAdamW([network], 0.02).param_groups)
    assert [tuple(p.shape) for p in muon] == [(8, 8)]
    assert [tuple(p.shape) for p in adam] == [(10, 8), (8,), (8,), (8,)]


def test_gram_newton_schulz_is_newton_schulz() -> None:
    """Against the iteration as published (Jordan et al. 2024), on a badly conditioned matrix."""
    matrix = torch.randn(24, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 96)
    x = matrix / matrix.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    assert torch.allclose(_orthogonal(matrix), x, atol=1e-4)
    assert torch.allclose(_orthogonal(matrix.T), x.T, atol=1e-4)


def test_kept_norms_stay_through_steps() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4))
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    optimizer = MuonAdamW([network], 0.05, weight_decay=0.0, keep_norm=True)
    for step in range(4):
        network(torch.randn(6, 8, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in network.named_parameters():
        assert not torch.equal(value, before[name])
        if value.ndim == 2:
            assert torch.allclose(value.norm(), before[name].norm(), rtol=1e-5)


def test_a_longer_run_shares_the_part_before_the_tail() -> None:
    for settle in (None, 250):
        short, long = (
            [learning_rate(step, steps, 1.0, tail=0.5, settle=settle) for step in range(400)] for steps in (1000, 2000)
        )
        assert short == long
        assert short[0] < short[199] == 1.0
    assert learning_rate(999, 4000, 1.0, settle=250) == 0.5
    assert learning_rate(999, 1000, 1.0) < 0.03


def test_adam_part_matches_torch() -> None:
    """The AdamW half without weight decay is torch's Adam with betas (0.9, 0.99)."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.LayerNorm(16), torch.nn.LayerNorm(16)
    mine = MuonAdamW([ours], 0.1, adam_ratio=0.1)
    mine.set_rate(0.1)
    reference = torch.optim.Adam(theirs.parameters(), lr=0.01, betas=(0.9, 0.99))
    for step in range(5):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(step))
        for module, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)

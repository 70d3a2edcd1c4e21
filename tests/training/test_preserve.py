"""Training towards the base's own prediction: identities, what is restored, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from training import company, config, controlnet, dreambooth, loop, lora, models, prepare
from training.batch import EntryTensors
from training.data import crops, images
from training.data.batches import Draws, Feed, Stream
from training.data.cache import Live
from training.errors import TrainingError
from training.estimate import estimate
from training.method import Method, Stepper, base_prediction
from training.pocket import base_path, scenes
from training.pocket.judging import to_pixels

Parts = models.Parts
KINDS: dict[str, Any] = {
    "lora": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, targets="conv", dropout=0.2)),
    "dora": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, dora=True)),
    "loha": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, kind="loha")),
    "lokr": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, kind="lokr")),
    "pissa": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, start="pissa", text_encoder=True)),
    "text": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, text_encoder=True)),
    "tokens": lambda parts: lora.prepare(parts, config.LoraSettings(rank=2, tokens={"<rex>": "d"})),
    "full": lambda parts: dreambooth.prepare(parts),
    "full text": lambda parts: dreambooth.prepare(parts, config.DreamBoothSettings(text_encoder=True)),
}


def batch_of(parts: Parts, captions: list[str], asked: list[str], inside: float = 0.0) -> dict[str, Any]:
    """Samples with captions, for all of which the base is asked."""
    random, count = torch.Generator().manual_seed(0), len(captions)
    drawn = {name: torch.randn(count, 4, 8, 8, generator=random) for name in ("latents", "noise")}
    ids = {f"ids_{n}": one for n, one in enumerate(models.tokenize_captions(parts, captions))}
    base_ids = {f"base_ids_{n}": one for n, one in enumerate(models.tokenize_captions(parts, asked))}
    more = {"preserved": torch.arange(count), "inside": torch.full((count, 1, 8, 8), inside)}
    frame = torch.tensor([[32.0, 32, 0, 0, 32, 32]]).expand(count, 6)
    return {**drawn, **ids, **base_ids, **more, "frame": frame, "timesteps": torch.tensor([100, 800][:count])}


def moved(method: Method) -> None:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in method.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_the_base_s_prediction_before_and_after_training(
    kind: str, family: str, base: Path, sdxl_base: Path
) -> None:
    parts = models.load_parts({"sd": base, "sdxl": sdxl_base}[family])
    method = KINDS[kind](parts)
    assert method.switch is not None
    method.base = method.switch()
    stepper = Stepper(method, torch.float32, torch.device("cpu")).eval()
    batch = batch_of(parts, ["a dog", ""], ["a dog", ""])
    wanted = base_prediction(method, batch, torch.float32)
    losses = stepper(batch)
    if kind == "dora":  # whose magnitudes over norms are one up to rounding
        assert losses.max() < 1e-10
    else:
        assert losses.tolist() == [0, 0]
    moved(method)
    losses = stepper(batch)
    assert losses.min() > 1e-8
    assert torch.equal(base_prediction(method, batch, torch.float32), wanted)  # what trains has no part in it
    assert torch.equal(stepper(batch), losses)  # and is switched on again
    losses.sum().backward()
    for name in method.models:  # SDXL leaves the last layer of its text encoders out
        assert any(value.grad is not None for key, value in method.trainable().items() if key.startswith(f"{name}."))
    assert all(parameter.grad is None for network in method.base.networks for parameter in network.parameters())


def test_adapters_are_on_again_after_an_error(base: Path) -> None:
    parts = models.load_parts(base)
    method = KINDS["lora"](parts)
    method.base = method.switch()
    moved(method)
    batch = batch_of(parts, ["a dog"], ["a dog"])
    stepper = Stepper(method, torch.float32, torch.device("cpu")).eval()
    before = stepper(batch)
    with pytest.raises(RuntimeError, match="stop"), method.base.models():
        raise RuntimeError("stop")
    assert torch.equal(stepper(batch), before)
    assert all(parameter.requires_grad for parameter in method.trainable().values())


def test_outside_the_subject_the_base_counts_and_inside_the_picture(base: Path) -> None:
    parts = models.load_parts(base)
    method = KINDS["lora"](parts)
    method.base = method.switch()
    moved(method)
    stepper = Stepper(method, torch.float32, torch.device("cpu")).eval()
    batch = batch_of(parts, ["a sks dog", "x"], ["a dog", "y"])
    with torch.no_grad():
        plain = method.step(stepper.models, batch, torch.float32)
        kept = stepper(batch)
        torch.testing.assert_close(stepper(batch | {"inside": torch.ones(2, 1, 8, 8)}), plain)
        half = torch.zeros(2, 1, 8, 8)
        half[..., :4] = 1
        left = batch | {"mask": half}
        right = batch | {"mask": 1 - half}
        method.objective = dataclasses.replace(method.objective, settings=config.ObjectiveSettings(background=0.0))
        expected = (
            method.objective.losses(lambda *_: torch.zeros_like(batch["latents"]), left)
            + method.objective.losses(
                lambda *_: torch.zeros_like(batch["latents"]),
                right | {"wanted": base_prediction(method, batch, torch.float32), "inside": torch.zeros(2, 1, 8, 8)},
            )
        ) / 2
        mixed = batch | {"wanted": base_prediction(method, batch, torch.float32), "inside": half}
        found = method.objective.losses(lambda *_: torch.zeros_like(batch["latents"]), mixed)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(kept, plain)


CAPTIONS = ["a sks dog on grass", "a sks dog", "a sks dog at night", "x"]


class Entries:
    """Four entries with a mask."""

    def __init__(self) -> None:
        self.names = self.captions = CAPTIONS
        self.sizes = [(16, 16)] * 4

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"mean": torch.tensor(float(index)), "mask": torch.full((1, 4, 4), 0.5)}


def test_the_base_is_asked_for_class_samples_emptied_captions_and_surroundings() -> None:
    asked = ["a dog on grass", "a dog", "a dog at night", "x"]
    own = Stream(entries=Entries(), share=1, asked=dict(zip(CAPTIONS, asked, strict=True)).__getitem__)
    streams = [own, Stream(entries=Entries(), share=1, preserved=True)]
    draws = Draws(latent_shape=(4, 4), caption_dropout=0.25)
    ids = {caption: torch.tensor([number]) for number, caption in enumerate(["", *CAPTIONS[:3], *asked])}

    def text(captions: list[str]) -> dict[str, torch.Tensor]:
        return {"embeds": torch.stack([ids[caption] for caption in captions])}

    feed = Feed(streams, draws, seed=0, batch_size=64, text=text)
    batch = feed.batch(0, 0)
    assert batch["preserved"].tolist() == list(range(64))
    empty = batch["embeds"][:, 0] == 0
    assert 6 <= int(empty.sum()) <= 28
    for row in range(64):
        whole = row % 2 == 1 or bool(empty[row])
        same = batch["base_embeds"][row, 0] == batch["embeds"][row, 0]
        assert bool(same) == (whole or int(batch["mean"][row]) == 3)
        assert batch["inside"][row].unique().tolist() == [0.0 if whole else 1.0]
    assert feed.asked == 1
    bare = Feed([Stream(entries=Entries()), streams[1]], draws, seed=0, batch_size=64, text=text)
    assert bare.asked == pytest.approx(0.5 + 0.5 * 0.25)
    off = Feed([Stream(entries=Entries())] * 2, draws, seed=0, batch_size=64, text=text)
    assert off.asked == 0
    assert off.batch(0, 0).keys() == {"mean", "timesteps", "noise", "posterior", "weight", "embeds"}


@pytest.mark.parametrize(("processes", "size"), [(2, 3), (3, 2), (4, 1)])
def test_processes_share_what_the_base_is_asked_evenly_and_every_sample_has_one_of_them(
    processes: int, size: int
) -> None:
    draws = Draws(latent_shape=(4, 4), caption_dropout=0.2)
    streams = [Stream(entries=Entries()), Stream(entries=Entries(), share=0.5, preserved=True)]
    together = Feed(streams, draws, seed=0, batch_size=2 * processes * size)
    feeds = [
        Feed(streams, draws, seed=0, batch_size=size, accumulation=2, processes=processes, rank=rank)
        for rank in range(processes)
    ]
    for step in range(20):
        found = []
        for micro in range(2):
            batches = [feed.batch(step, micro) for feed in feeds]
            counts = [len(batch["preserved"]) for batch in batches]
            assert max(counts) - min(counts) <= 1
            found += [noise for batch in batches for noise in batch["noise"]]
        whole = together.batch(step, 0)["noise"]
        order = [next(number for number, one in enumerate(whole) if torch.equal(one, noise)) for noise in found]
        assert sorted(order) == list(range(len(whole)))


def subject(folder: Path, *, masks: bool = True) -> crops.Views:
    """Three pictures of a subject: a white square on grey."""
    place, holes = folder / "subject", folder / "holes"
    for made in (place, holes):
        made.mkdir(parents=True)
    for number, caption in enumerate(["a sks dog", "a sks dog at night", "an owl and a sks dog"]):
        hole = np.zeros((32, 32), np.uint8)
        hole[8:20, 4 + 4 * number : 16 + 4 * number] = 255
        Image.fromarray(hole).save(holes / f"{number}.png")
        Image.fromarray(np.maximum(hole, 90)).convert("RGB").save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(caption)
    return crops.Views(images.folder(place, masks=holes if masks else None, minimum=8), resolution=32)


def square(parts: Parts, entry: dict[str, torch.Tensor], caption: str, without: str) -> torch.Tensor:
    """Says that the class is in the middle half of every picture."""
    found = torch.zeros(1, 8, 8)
    found[:, 2:6, 2:6] = 1
    return found


def settings(**changes: object) -> config.DreamBoothSettings:
    return config.DreamBoothSettings(**{"identifier": "sks", **changes})  # type: ignore[arg-type]


def test_without_class_images_the_subject_s_own_serve_under_their_class_captions(base: Path, tmp_path: Path) -> None:
    data = subject(tmp_path)
    made = dreambooth.prior(models.load_parts(base), settings(), data, folder=tmp_path / "class")
    assert made is not None
    assert made.to_base
    assert [made.views.caption(index) for index in range(3)] == ["a dog", "a dog at night", "an owl and a dog"]
    assert [made.views.key(index) for index in range(3)] == [data.key(index) for index in range(3)]  # cached once
    assert not (tmp_path / "class").exists()
    caption = dreambooth.class_caption("a big <rex> and a sks eel", identifier="sks", words={"<rex>": "owl"})
    assert caption == "a big owl and an eel"


def test_a_subject_is_placed_where_the_base_drew_its_class(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(company, "drawn_object", square)  # the tiny base draws nothing
    parts, data = models.load_parts(base), subject(tmp_path)
    lines = tmp_path / "lines.txt"
    lines.write_text("{} on grass\na cat\n{} at night\n")
    chosen = settings(class_prompt="a dog", class_prompt_file=str(lines), class_images=6, steps=1, company=0.5)
    made = dreambooth.prior(parts, chosen, data, folder=tmp_path / "class")
    assert made is not None
    assert made.placed is not None
    assert made.own is not None
    concept = dreambooth.Concept(name="dog", views=data, prior=made)
    streams = prepare._streams(concept, lambda found: Live(found, parts.vae_scale_factor), alone=True)
    assert [stream.share for stream in streams] == [0.5, 0.5, 0.5, 0.5]  # own, placed, class, placed as class
    assert [stream.weight for stream in streams] == [2, 2, 2, 2]
    assert [stream.preserved for stream in streams] == [False, False, True, True]
    assert streams[3].entries.captions == ["a dog on grass", "a dog at night"] * 2  # under both captions
    captions = [made.placed.caption(index) for index in range(len(made.placed))]
    assert captions == ["a sks dog on grass", "a sks dog at night"] * 2
    drawn = np.asarray(made.views.source[0].image)
    found = made.placed.source[0]
    inside = np.asarray(found.mask) > 0
    assert inside[8:24, 8:24].all()  # the base's own is hidden
    assert np.array_equal(np.asarray(found.image)[~inside], drawn[~inside])
    assert (np.asarray(found.image)[12:20, 12:20] == 255).all()
    method = lora.prepare(parts, config.LoraSettings(rank=2))
    train = config.TrainSettings(steps=2, batch_size=4, trackers=[], log_every=1)
    result = loop.train(method, data, train, out=tmp_path / "out", prior=made, say=lambda line: None)
    assert result is not None


def test_where_no_single_object_is_nothing_is_placed() -> None:
    for region in (torch.zeros(1, 8, 8), torch.ones(1, 8, 8), torch.eye(8)[None]):
        assert company.find_spot(region, (32, 32)) is None


def test_a_cut_out_that_fits_keeps_its_pixels_and_moves_by_whole_cells() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 32, 32))
    sample = images.Sample(image=Image.fromarray(pixels), caption="", mask=mask)
    region = torch.zeros(1, 16, 16)
    region[:, 0:5, 9:13] = 1
    for spot, kept in ((company.Spot(37, 3, 15, 17), True), (company.Spot(20, 3, 34, 34), False)):
        made = company.paste_subject(Image.new("RGB", (64, 64)), region, spot, sample, "a sks dog", cell=16)
        assert made is not None
        found = np.asarray(made.image)[0:16, 32:48]
        assert np.array_equal(found, pixels[16:32, 16:32]) == kept


def test_the_whole_object_is_found_that_a_word_means() -> None:
    """In true scenes of the embedded world, whose masks are known: attention sees of a boat its hull alone."""
    parts, covered, larger = models.load_parts(base_path()), [], []
    for noun in ("a boat", "an umbrella", "a turtle", "a dog"):
        for line in ("{} on the grass", "{} and a house in the snow"):
            scene = scenes.from_prompt(line.replace("{}", noun), seed=1)
            mean, std = models.encode_images(parts.vae, to_pixels([Image.fromarray(scene.image)]))
            frame = torch.tensor([64.0, 64, 0, 0, 64, 64])
            entry: EntryTensors = {"mean": mean[0], "std": std[0], "frame": frame}
            found = company.drawn_object(parts, entry, scene.caption, line.replace("{}", "a sks"))
            assert not company.drawn_object(parts, entry, scene.caption, scene.caption).any()  # where no word goes
            true = F.adaptive_avg_pool2d(torch.tensor(scene.masks[:1]).float(), found.shape[1:])
            covered.append(float((found * true).sum() / true.sum()))
            larger.append(float(found.sum() / true.sum()))
    assert np.mean(covered) > 0.85
    assert min(covered) > 0.6
    assert np.mean(larger) < 1.7


def test_a_hole_of_any_size_is_filled() -> None:
    for side in (64, 512):
        picture, hole = Image.new("RGB", (side, side), (0, 0, 255)), Image.new("L", (side, side))
        inner = (side // 4, side // 4, 3 * side // 4, 3 * side // 4)
        picture.paste((255, 0, 0), inner)
        hole.paste(255, inner)
        filled = np.asarray(company._filled(picture, hole)).astype(int)
        assert np.abs(filled - (0, 0, 255)).max() <= 1


@pytest.mark.parametrize("wide", [4, 8])
def test_a_place_unlike_the_usual_ones_is_left_out(
    wide: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A place that takes in everything would have the subject cover what else the caption names."""
    parts, data = models.load_parts(base), subject(tmp_path)
    lines = tmp_path / "lines.txt"
    lines.write_text("{} on grass\n{} and a cat\n{} at night\n")
    chosen = settings(class_prompt="a dog", class_prompt_file=str(lines), class_images=3, steps=1, company=0.5)

    def unlike_with_a_cat(parts: Parts, entry: dict[str, torch.Tensor], caption: str, without: str) -> torch.Tensor:
        assert without == caption.replace("a dog", "a sks")
        found = torch.zeros(1, 8, 8)
        if "cat" in caption:
            found[:, :4, :wide] = 1  # twice the side, or once more
        else:
            found[:, 3:5, 3:5] = 1
        return found

    monkeypatch.setattr(company, "drawn_object", unlike_with_a_cat)
    made = dreambooth.prior(parts, chosen, data, folder=tmp_path / "class")
    assert made is not None
    assert made.placed is not None
    captions = [made.placed.caption(index) for index in range(len(made.placed))]
    assert captions == ["a sks dog on grass", "a sks dog at night"]


@pytest.mark.parametrize("kind", ["text", "full"])
def test_a_preserved_batch_may_be_split_into_micro_steps(kind: str, base: Path, tmp_path: Path) -> None:
    data, found = subject(tmp_path), []
    for size, accumulation in ((4, 1), (1, 4)):
        parts = models.load_parts(base)
        made = dreambooth.prior(parts, settings(surroundings="base"), data, folder=tmp_path / "class")
        train = config.TrainSettings(
            steps=4, batch_size=size, accumulation=accumulation, learning_rate=1e-2, trackers=[], log_every=1
        )
        out, method = tmp_path / f"out-{size}", KINDS[kind](parts)
        result = loop.train(method, data, train, out=out, prior=made, say=lambda line: None)
        assert result is not None
        found.append(result.losses)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-4 if kind == "full" else 1e-5)


def test_the_estimate_counts_the_base_s_copy_and_its_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = models.load_parts(base)
    method = dreambooth.prepare(parts)
    stepper, chosen = Stepper(method, torch.float32, torch.device("cpu")), config.TrainSettings()
    batch = batch_of(parts, ["a dog"], ["a dog"])
    plain = estimate(method, stepper, batch, chosen)
    assert method.switch is not None
    method.base = method.switch()
    clock = iter(range(100))
    monkeypatch.setattr("training.estimate.time.perf_counter", lambda: float(next(clock)))
    kept = estimate(method, stepper, batch, chosen, asked=0.5)
    assert kept.weights == 2 * plain.weights
    assert kept.step_seconds == pytest.approx(1.5)  # each timed part takes one tick
    assert kept.activations == plain.activations


def test_what_cannot_be_preserved_is_refused(base: Path, pictures: Path, tmp_path: Path) -> None:
    parts, data = models.load_parts(base), subject(tmp_path)

    def prior(chosen: config.DreamBoothSettings, own: crops.Views = data, **more: Any) -> dreambooth.Prior | None:
        return dreambooth.prior(parts, chosen, own, folder=tmp_path / "class", **more)

    assert prior(settings(preserve="off", class_prompt="a dog")) is None
    assert prior(settings(preserve="pictures")) is None
    with pytest.raises(TrainingError, match=r"preserve: base needs samples of the class: set dreambooth.class_prompt"):
        prior(settings(identifier=None))
    with pytest.raises(TrainingError, match=r"dreambooth.identifier: zwx is not in the caption 'a sks dog'"):
        prior(settings(identifier="zwx"))
    lines = tmp_path / "lines.txt"
    lines.write_text("{}\n")
    asked = {"class_prompt": "a dog", "class_prompt_file": str(lines), "class_images": 1, "steps": 1, "company": 0.5}
    with pytest.raises(TrainingError, match=r"dreambooth.company cuts the subject out of its pictures: set data.masks"):
        prior(settings(**asked), subject(tmp_path / "bare", masks=False))
    assert not list(tmp_path.rglob("00000.png"))  # said before any class image is drawn
    with pytest.raises(TrainingError, match=r"dreambooth.company 0.5 .*set dreambooth.identifier, class_prompt"):
        settings(company=0.5)
    with pytest.raises(TrainingError, match=r"surroundings: base and company need dreambooth.preserve: base, not off"):
        settings(surroundings="base", preserve="off")
    made = prior(settings())
    method = dataclasses.replace(KINDS["lora"](parts), switch=None)
    with pytest.raises(TrainingError, match=r"preserve: base .* method lora has no switch"):
        loop.train(method, data, config.TrainSettings(trackers=[]), out=tmp_path / "out", prior=made)
    own = crops.Views(images.folder(pictures, conditioning=pictures, minimum=8), resolution=32)
    control = controlnet.prepare(models.load_parts(base))
    with pytest.raises(TrainingError, match="class images have no conditioning"):
        loop.train(control, own, config.TrainSettings(trackers=[]), out=tmp_path / "out", prior=made)

"""What S-CFG may not cost: maps of size heads x N x N, tensors kept across blocks, slow imports."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import scfg_tiny as tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scfg import SemanticCFG, attach, segment

N = 24 * 24
HEADS = 2


class MadeTensors(TorchDispatchMode):
    """Element counts of every tensor made."""

    def __init__(self):
        super().__init__()
        self.counts = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.counts.add(tensor.numel())
        return out


def square_tensors():
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() >= N * N]


@pytest.mark.parametrize("limit", [segment.EXPLICIT_LIMIT, 0])
def test_no_map_of_all_heads_is_made_and_none_is_kept_across_blocks(limit, monkeypatch):
    monkeypatch.setattr(segment, "EXPLICIT_LIMIT", limit)
    pipe = tiny.sd()
    kept = []
    pipe.unet.register_forward_hook(lambda *_: kept.extend(square_tensors()))
    for block in pipe.unet.up_blocks:
        block.register_forward_hook(lambda *_: kept.extend(square_tensors()))
    size = {"latents": tiny.noise(size=(24, 24)), "height": 48, "width": 48}
    with attach(pipe, SemanticCFG(latent_ratio=1)) as run, MadeTensors() as made:
        tiny.run_latents(pipe, num_inference_steps=1, **size, **tiny.embeddings())
    assert (run.trace[0].effective_scale != 1).all()
    allowed = N * N if limit else N * N - 1  # one matrix of one image, or none at all
    assert max(made.counts) <= allowed < HEADS * N * N
    assert kept == []


def test_both_ways_give_the_same_masks(monkeypatch):
    pipe = tiny.sd(model=tiny.unet().double())  # so that no kernel's rounding decides between two regions
    call = {name: value.double() for name, value in ({"latents": tiny.noise(2)} | tiny.embeddings(2)).items()}
    traces = []
    for limit in (2**24, 0):
        monkeypatch.setattr(segment, "EXPLICIT_LIMIT", limit)
        with attach(pipe, SemanticCFG(), record=["regions", "gamma"]) as run:
            tiny.run_latents(pipe, **tiny.SIZE, **call)
        traces.append(run.trace)
    for one, other in zip(*traces, strict=True):
        assert torch.equal(one.regions, other.regions)
        torch.testing.assert_close(one.effective_scale, other.effective_scale, rtol=1e-6, atol=1e-6)


def test_half_precision_projections_give_float32s_masks():
    """From the same half-precision queries and keys, softmax and means are those of float32."""
    from scfg.attention import mean_attention

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        query, key = (torch.randn(1, 64, 16, generator=generator).to(dtype) for _ in range(2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            half = mean_attention(query, key, heads=2, scale=0.3)
        assert torch.equal(half, mean_attention(query.float(), key.float(), heads=2, scale=0.3))


def test_importing_costs_little_and_brings_no_diffusers():
    program = (
        "import sys, time; import torch; begin = time.process_time(); import scfg; "
        "print(time.process_time() - begin, 'diffusers' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(2)
    ]
    seconds, diffusers = zip(*(run.stdout.split() for run in runs), strict=True)
    assert set(diffusers) == {"False"}
    assert min(map(float, seconds)) <= 0.5

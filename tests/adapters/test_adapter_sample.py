"""The same images however they are batched, sharded, interrupted."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hangs import limited
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from adapters.errors import AdapterError
from adapters.measuring import sample

PROMPTS = ["a dog", "a red car on grass"]
SEEDS = [3, 4, 5]


def shoot(pipe, **settings):
    return sample.images(pipe, PROMPTS, SEEDS, **{"steps": 2, "guidance_scale": 3.0, **settings})


def close(a, b) -> bool:
    """At most one grey level apart: the rounding of batched matrix products."""
    return np.abs(np.asarray(a.image, int) - np.asarray(b.image, int)).max() <= 1


def test_order_and_noise(pipe):
    shots = shoot(pipe)
    assert [(s.prompt, s.seed) for s in shots] == [(p, s) for p in PROMPTS for s in SEEDS]
    assert len({s.latents for s in shots}) == len(SEEDS)  # the noise is the seed's, whatever the prompt
    assert len({s.image.tobytes() for s in shots}) == len(shots)


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_batch_size_changes_nothing(pipe, batch_size):
    ours, others = shoot(pipe, batch_size=batch_size), shoot(pipe, batch_size=2)
    assert [s.key for s in ours] == [s.key for s in others]
    assert all(close(a, b) for a, b in zip(ours, others, strict=True))


def test_stochastic_scheduler_draws_from_the_images_own_generator(pipe):
    from diffusers import DDPMScheduler

    before = pipe.scheduler
    pipe.scheduler = DDPMScheduler(clip_sample=False)
    try:
        assert all(close(a, b) for a, b in zip(shoot(pipe, batch_size=1), shoot(pipe, batch_size=6), strict=True))
    finally:
        pipe.scheduler = before


def test_shards_together_are_the_whole(pipe, tmp_path):
    whole = {s.key: s for s in shoot(pipe)}
    for rank in range(3):
        shoot(pipe, folder=tmp_path, rank=rank, world=3)
    parts = {s.key: s for s in sample.shots_in(tmp_path)}
    assert parts.keys() == whole.keys()
    assert all(close(parts[k], whole[k]) for k in whole)


def test_png_remembers_everything(pipe, tmp_path):
    shots = shoot(pipe, folder=tmp_path, arm="cfg", settings={"guidance": {"name": "cfg"}})
    again, settings = sample.read(shots[0].path)
    assert again.key == shots[0].key
    assert again.arm == "cfg"
    assert again.image.tobytes() == shots[0].image.tobytes()
    assert settings["steps"] == 2
    assert settings["guidance"] == {"name": "cfg"}


def test_resumed_equals_uninterrupted(pipe, tmp_path):
    whole = shoot(pipe, batch_size=1)
    entered = []

    @contextlib.contextmanager
    def dies_after_two():
        calls = 0
        step = pipe.unet.forward

        def forward(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > 4:
                raise KeyboardInterrupt
            return step(*args, **kwargs)

        pipe.unet.forward = forward
        try:
            entered.append(True)
            yield
        finally:
            del pipe.unet.forward

    with pytest.raises(KeyboardInterrupt):
        shoot(pipe, batch_size=1, folder=tmp_path, around=dies_after_two)
    assert entered
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert not list(tmp_path.glob("*.part"))
    resumed = shoot(pipe, batch_size=1, folder=tmp_path)
    assert [s.image.tobytes() for s in resumed] == [s.image.tobytes() for s in whole]


def test_a_damaged_picture_is_drawn_again(pipe, tmp_path):
    whole = shoot(pipe, folder=tmp_path)
    other, path = sorted(tmp_path.glob("*.png"))[:2]
    before = path.read_bytes()
    for data in (before[:200], b"", exchanged(before, other)):
        path.write_bytes(data)
        with pytest.warns(UserWarning, match="it is drawn again"):
            again = shoot(pipe, folder=tmp_path)
        assert [s.image.tobytes() for s in again] == [s.image.tobytes() for s in whole]
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(UserWarning, match="not a regular file.*it is drawn again"), limited("a FIFO", 10):
        again = shoot(pipe, folder=tmp_path)
    assert [s.image.tobytes() for s in again] == [s.image.tobytes() for s in whole]
    assert path.is_file()


def exchanged(data: bytes, other: Path) -> bytes:
    """A whole PNG that says what `data` says, of other pixels."""
    file, info = io.BytesIO(), PngInfo()
    with Image.open(io.BytesIO(data)) as image:
        info.add_itxt(sample.METADATA_KEY, image.text[sample.METADATA_KEY])
    with Image.open(other) as image:
        image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def test_resume_refuses_other_settings(pipe, tmp_path):
    shoot(pipe, folder=tmp_path)
    with pytest.raises(AdapterError, match="guidance_scale"):
        shoot(pipe, folder=tmp_path, guidance_scale=4.0)


def test_around_is_entered_once_and_recorded(pipe):
    entries = []

    @contextlib.contextmanager
    def around():
        entries.append("in")
        yield "run"
        entries.append("out")

    seen = []

    def record(run):
        seen.append(run)
        return [{"effective_scale": 2.0}] * 3

    shots = shoot(pipe, around=around, batch_size=3, record=record)
    assert entries == ["in", "out"]
    assert seen == ["run", "run"]
    assert all(s.numbers == {"effective_scale": 2.0} for s in shots)
    shoot(pipe, around=around())
    assert entries == ["in", "out"] * 2


def test_bad_numbers_are_refused(pipe):
    with pytest.raises(AdapterError, match="batch_size=0"):
        shoot(pipe, batch_size=0)
    with pytest.raises(AdapterError, match="rank=2"):
        shoot(pipe, rank=2, world=2)

"""Pictures of a run: what is in them, not how pretty they are."""

from __future__ import annotations

import numpy as np
import pytest
import scfg_tiny as tiny
import torch
from PIL import Image

from scfg import ScfgError, SemanticCFG, Word, attach, visualize


@pytest.fixture(scope="module")
def recorded():
    pipe = tiny.sd(**tiny.text_parts())
    with attach(pipe, SemanticCFG(), record=["regions", "gamma", "prediction"]) as run:
        tiny.run_latents(pipe, prompt=["a red dog", "dog"], latents=tiny.noise(2), **tiny.SIZE)
    return pipe, run


def test_names_of_regions():
    words = [Word("a", (1,)), Word("cat", (2, 3))]
    assert visualize.region_names(words, 6, grouped=False, length=6) == ["[BOS]", "a", "cat", "cat", "[EOS]", "[pad]"]
    assert visualize.region_names(words, 2, grouped=True, length=6) == ["a", "cat"]
    assert visualize.region_names(None, 2, grouped=False, length=6) == ["token 0", "token 1"]


def test_an_overlay_paints_each_region_in_one_color_and_lists_it():
    index = torch.tensor([[0, 0], [1, 1]])
    picture = Image.new("RGB", (64, 64), "black")
    overlay = visualize.region_overlay(picture, index, ["sky", "dog"], opacity=1.0)
    pixels = np.asarray(overlay)[: visualize.SIDE]
    top, bottom = pixels[: visualize.SIDE // 2].reshape(-1, 3), pixels[visualize.SIDE // 2 :].reshape(-1, 3)
    assert len(np.unique(top, axis=0)) == len(np.unique(bottom, axis=0)) == 1
    assert (top[0] != bottom[0]).any()
    assert overlay.height == visualize.SIDE + 6 + 2 * 14  # a line per region


def test_the_legend_is_of_words_only_and_the_rest_is_left_unpainted():
    words = [Word("pad", (1,))]  # a word of the prompt, which padding is not
    names = visualize.region_names(words, 4, grouped=False, length=4)
    picture = Image.new("RGB", (64, 64), (10, 200, 30))
    overlay = visualize.region_overlay(picture, torch.tensor([[0, 1], [2, 3]]), names, opacity=1.0)
    assert overlay.height == visualize.SIDE + 6 + 14
    pixels, quarter = np.asarray(overlay), visualize.SIDE // 4
    for row, column, painted in ((1, 1, False), (1, 3, True), (3, 1, False), (3, 3, False)):
        found = tuple(pixels[row * quarter, column * quarter])
        assert (found != (10, 200, 30)) == painted


def test_a_word_keeps_its_color_whatever_its_area():
    picture, names = Image.new("RGB", (64, 64), "black"), ["sky", "dog"]

    def corner(index):
        overlay = visualize.region_overlay(picture, torch.tensor(index), names, opacity=1.0)
        return tuple(np.asarray(overlay)[visualize.SIDE - 4, visualize.SIDE - 4])

    assert corner([[0, 0], [0, 1]]) == corner([[1, 1], [1, 1]])


def test_the_heat_map_is_white_at_one_red_above_and_blue_below():
    gamma = torch.tensor([[1.0, 2.0], [0.5, 1.0]])
    pixels = np.asarray(visualize.gamma_heat_map(gamma)).astype(int)
    quarter = visualize.SIDE // 4
    one, high, low = pixels[quarter, quarter], pixels[quarter, 3 * quarter], pixels[3 * quarter, quarter]
    assert one.min() > 240
    assert high[0] > high[2]
    assert low[2] > low[0]


def test_strip_gif_and_curves(recorded, tmp_path):
    pipe, run = recorded
    visualize.save_strip(tmp_path / "strip.png", run, pipe, columns=2)
    picture = Image.open(tmp_path / "strip.png")
    assert picture.width > 2 * visualize.SIDE
    assert picture.height > 3 * visualize.SIDE
    visualize.save_gif(tmp_path / "steps.gif", run, pipe, image=1)
    assert Image.open(tmp_path / "steps.gif").n_frames == tiny.STEPS
    figure = visualize.norm_curves(run)
    figure.savefig(tmp_path / "curves.png")
    labels = {line.get_label() for line in figure.axes[0].lines}
    assert labels <= {"[BOS]", "a", "red", "dog", "[EOS]", "[pad]"}
    assert all(len(line.get_xdata()) <= tiny.STEPS for line in figure.axes[0].lines)


def test_the_recorded_prediction_is_where_ddim_would_go(recorded):
    """x0 of the trace against the scheduler's own, at the last step, whose result is x0 itself."""
    pipe, _ = recorded
    pipe.scheduler = tiny.scheduler(set_alpha_to_one=True)
    with attach(pipe, SemanticCFG(), record=["prediction"]) as run:
        latents = tiny.run_latents(pipe, prompt="a red dog", latents=tiny.noise(), **tiny.SIZE)
    clipped = run.trace[-1].prediction.clamp(-1, 1)  # the scheduler's default
    torch.testing.assert_close(clipped, latents, rtol=1e-4, atol=1e-4)


def test_nothing_recorded_is_said(recorded):
    pipe, run = recorded
    with pytest.raises(ScfgError, match="image=7"):
        visualize.step_images(run, pipe, image=7)
    with attach(pipe, SemanticCFG()) as bare:
        tiny.run_latents(pipe, prompt="dog", latents=tiny.noise(), **tiny.SIZE)
    with pytest.raises(ScfgError, match="record="):
        visualize.strip(bare, pipe)

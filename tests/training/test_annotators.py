"""Conditions made from pictures: by OpenCV, and by tiny random networks read from folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import picture

from adapters.edges import Canny
from training.config import DataSettings
from training.data import images
from training.data.annotators import ANNOTATORS, annotator
from training.errors import TrainingError

PROCESSOR = {"size": {"height": 64, "width": 64}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    torch.manual_seed(0)
    widths = {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 16], "num_attention_heads": [1, 2, 2, 2]}
    folder = tmp_path_factory.mktemp("segformer")
    SegformerForSemanticSegmentation(SegformerConfig(**widths, decoder_hidden_size=16, num_labels=5)).save_pretrained(
        folder
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import DPTConfig, DPTForDepthEstimation

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=8,
    )
    folder = tmp_path_factory.mktemp("dpt")
    network = DPTForDepthEstimation(config)
    last = [module for module in network.head.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    torch.nn.init.ones_(last.bias)  # a random head may be all below zero, which its last ReLU makes flat
    network.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def test_canny_takes_the_thresholds_of_the_data_and_has_a_key_of_its_own_for_them(tmp_path: Path) -> None:
    for index in range(2):
        picture(index, (64, 48)).save(tmp_path / f"{index}.png")
    common = {"source": str(tmp_path), "prompt": "a thing", "annotator": "canny", "minimum": 8}
    plain = images.load_images(DataSettings(**common))
    low = images.load_images(DataSettings(**common, canny=(20, 60)))
    for source, detector in ((plain, Canny()), (low, Canny(low=20, high=60))):
        wanted = detector.condition(source[0].image)
        assert np.array_equal(np.asarray(source[0].conditioning), np.asarray(wanted))
    assert plain.key(0) != low.key(0)
    assert np.array_equal(np.asarray(annotator("canny")(low[0].image)), np.asarray(plain[0].conditioning))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"annotator": "canny", "canny": (200, 100)}, r"data.canny must be 0 < lower < upper, got 200 and 100"),
        ({"annotator": "canny", "canny": (0, 100)}, r"data.canny must be 0 < lower < upper, got 0 and 100"),
        ({"canny": (50, 100)}, r"data.canny needs data.annotator canny"),
    ],
)
def test_thresholds_that_mean_nothing_are_refused(changes: dict, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        DataSettings(source="x", **changes)


def test_segmentation_paints_classes_in_their_colors_at_the_picture_s_size(segmenter: Path) -> None:
    image = picture(3, (96, 48))
    classes = annotator("segmentation", str(segmenter))(image)
    assert classes.size == image.size
    colors = {tuple(int(value) for value in color) for color in np.asarray(classes).reshape(-1, 3)}
    assert 1 <= len(colors) <= 5
    assert np.array_equal(np.asarray(classes), np.asarray(annotator("segmentation", str(segmenter))(image)))


def test_depth_fills_the_range_of_grey(depth_model: Path) -> None:
    depth = np.asarray(annotator("depth", str(depth_model))(picture(3, (96, 48))))
    assert depth.shape == (48, 96, 3)
    assert depth.min() == 0
    assert depth.max() == 255
    assert np.array_equal(depth[..., 0], depth[..., 1])


def test_training_conditions_are_made_by_it_and_keyed_by_its_name(segmenter: Path, tmp_path: Path) -> None:
    for index in range(2):
        picture(index, (64, 64)).save(tmp_path / f"{index}.png")
    common = {"source": str(tmp_path), "prompt": "a thing", "annotator": "segmentation"}
    made = images.load_images(DataSettings(**common, annotator_model=str(segmenter)))
    assert isinstance(made[0].conditioning, Image.Image)
    assert made[0].conditioning.size == (64, 64)
    edges = images.load_images(DataSettings(source=str(tmp_path), prompt="a thing", annotator="canny"))
    assert made.key(0) != edges.key(0)


@pytest.mark.parametrize(
    ("name", "model", "said"),
    [
        ("hed", None, "annotator 'hed' is unknown; there are canny, lineart, depth, segmentation"),
        ("depth", None, "annotator depth needs a network: set annotator_model"),
        ("depth", "./nowhere", "annotator_model ./nowhere cannot be loaded"),
    ],
)
def test_what_is_missing_is_named(name: str, model: str | None, said: str) -> None:
    with pytest.raises(TrainingError, match=said.replace("(", r"\(")):
        annotator(name, model)


def test_the_settings_offer_what_there_is() -> None:
    for name in ANNOTATORS:
        assert DataSettings(source="x", annotator=name).annotator == name

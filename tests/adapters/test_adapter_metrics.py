"""Metrics against hand-made values and against well-kept libraries."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from adapters.edges import Canny
from adapters.errors import FormatError, GainsError
from adapters.measuring import metrics
from adapters.measuring.metrics import sets
from adapters.measuring.sample import Shot


def picture(*color: int, size: int = 32) -> Image.Image:
    return Image.new("RGB", (size, size), color)


def noise(seed: int, size: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


def shot(image: Image.Image, prompt: str = "p", seed: int = 0) -> Shot:
    return Shot(prompt=prompt, seed=seed, latents="n", image=image)


def mean_color(images):
    return np.stack([np.asarray(i, float).mean(axis=(0, 1)) for i in images])


def test_similarity_by_hand():
    metric = metrics.Similarity(name="s", features=mean_color, references=[picture(255, 0, 0), picture(0, 255, 0)])
    values = metrics.score(metric, [shot(picture(255, 0, 0)), shot(picture(9, 9, 0)), shot(picture(0, 0, 3))])
    assert values == pytest.approx([0.5, 2**-0.5, 0])


def test_masked_similarity_sees_only_the_subject():
    left = np.zeros((32, 32), bool)
    left[:, :16] = True

    def half(subject, background):
        image = picture(*background)
        image.paste(subject, (0, 0, 16, 32))
        return image

    reference = half((255, 0, 0), (0, 0, 255))
    copied_background, right_subject = half((0, 255, 0), (0, 0, 255)), half((255, 0, 0), (0, 255, 0))
    common = {"features": mean_color, "references": [reference]}
    masked = metrics.Similarity(name="m", reference_masks=[left], mask=lambda images: [left] * len(images), **common)
    values = metrics.score(masked, [shot(copied_background), shot(right_subject), shot(reference)])
    assert values[1] == values[2] == pytest.approx(1)
    assert values[0] < 0.9
    nothing = metrics.Similarity(name="m", reference_masks=[left], mask=lambda i: [left & False] * len(i), **common)
    assert metrics.score(nothing, [shot(reference)]) == [0]
    with pytest.raises(GainsError, match="both"):
        metrics.Similarity(name="m", reference_masks=[left], **common)


def test_identity_by_hand():
    subject, base = [picture(255, 0, 0), picture(255, 60, 0)], [picture(60, 255, 0), picture(0, 255, 0)]
    look, own = metrics.look_of(mean_color, subject)
    calls = []

    def classes():
        calls.append(1)
        return [shot(image) for image in base]

    made = {
        margin: metrics.Identity(name="i", look=look, own=own, classes=classes, margin=margin)
        for margin in (False, True)
    }
    shots = [shot(image) for image in (*base, *subject, picture(200, 160, 0), picture(0, 0, 255))]
    margins = metrics.score(made[True], shots)
    assert (margins[:2] < -0.4).all()  # the base's own pictures
    assert (margins[2:4] > 0.4).all()
    assert metrics.score(made[False], shots).tolist() == [0, 0, 1, 1, 1, 0]
    theirs, seen = look([shot(image) for image in base]), look(shots[4:5])
    high, within, low = own[0] @ own[1], theirs[0] @ theirs[1], (own @ theirs.T).mean()
    to_subject, to_base = 1 - 2 * (own @ seen.T).mean() + high, 1 - 2 * (theirs @ seen.T).mean() + within
    assert margins[4] == pytest.approx((to_base - to_subject) / (2 * (high + within - 2 * low)))  # squared distances
    assert len(calls) == 2  # once a metric, for base pictures cost
    masks = {"masks": [np.ones((32, 32), bool)] * 2, "mask": lambda i: [np.zeros((32, 32), bool)] * len(i)}
    nothing, own = metrics.look_of(mean_color, subject, **masks)
    absent = metrics.Identity(name="i", look=nothing, own=own, classes=classes, margin=True)
    assert metrics.score(absent, shots[:1]) == [-0.5]
    with pytest.raises(GainsError, match=r"i: the base's pictures of the class are as like .* not tell them apart"):
        metrics.Identity(name="i", look=look, own=own, classes=lambda: [shot(subject[0])])(shots)
    with pytest.raises(GainsError, match="i: the base draws the class in none of these prompts"):
        metrics.Identity(name="i", look=look, own=own, classes=list)(shots)
    with pytest.raises(GainsError, match="two pictures of the subject"):
        metrics.Identity(name="i", look=look, own=own[:1, :1], classes=list)


def test_diversity_is_within_a_prompt():
    metric = metrics.Diversity(name="d", features=mean_color)
    red, green = picture(255, 0, 0), picture(0, 255, 0)
    values = metrics.score(metric, [shot(red), shot(red), shot(green), shot(green, "alone")])
    assert values[:3] == pytest.approx([0.5, 0.5, 1.0])
    assert np.isnan(values[3])


def test_drift_joins_with_the_base():
    metric = metrics.Drift(name="d", features=mean_color, base=[shot(picture(255, 0, 0))])
    assert metrics.score(metric, [shot(picture(9, 0, 0))]) == pytest.approx([0])
    with pytest.raises(GainsError, match="no image"):
        metric([shot(picture(9, 0, 0), seed=1)])


def test_frechet_against_the_textbook_formula():
    generator = np.random.default_rng(0)
    for n, m, d in [(200, 150, 5), (20, 30, 50)]:
        x, y = generator.normal(size=(n, d)), generator.normal(size=(m, d)) * 2 + 1
        sx, sy = np.cov(x.T), np.cov(y.T)
        root = scipy.linalg.sqrtm(sx @ sy).real
        textbook = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx + sy - 2 * root)
        assert metrics.frechet(x, y) == pytest.approx(textbook, rel=1e-3)
    assert metrics.frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(x, x + 3) == pytest.approx(9 * d)


def test_kernel_distance_by_hand_and_unbiased():
    x, y = np.array([[0.0], [1.0]]), np.array([[2.0], [0.0]])
    k = lambda a, b: (a * b + 1) ** 3  # noqa: E731
    by_hand = k(0, 1) - 2 * np.mean([k(0, 2), k(0, 0), k(1, 2), k(1, 0)]) + k(2, 0)
    assert metrics.kernel_distance(x, y) == pytest.approx(by_hand)
    generator = np.random.default_rng(0)
    draws = [
        metrics.kernel_distance(generator.normal(size=(10, 4)), generator.normal(size=(10, 4))) for _ in range(800)
    ]
    assert abs(np.mean(draws)) < 3 * np.std(draws) / np.sqrt(800)  # a biased estimator would be about +3 off
    metric = metrics.Kid(name="kid", features=mean_color, references=[noise(i) for i in range(5)])
    shots = [shot(noise(i)) for i in range(5, 9)]
    both = [mean_color([s.image for s in shots]), mean_color([noise(i) for i in range(5)])]
    assert metrics.score(metric, shots).mean() == pytest.approx(sets.kernel_distance(*both))


def test_canny_f1_by_hand():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[0, :2], b[0, 1:4] = True, True
    assert metrics.canny_f1(a, b, reach=0) == pytest.approx(2 / 5)
    assert metrics.canny_f1(a, b) == pytest.approx(2 * (2 / 3) / (1 + 2 / 3))  # a lies near b, 2/3 the other way
    assert metrics.canny_f1(b, a) == metrics.canny_f1(a, b)
    assert metrics.canny_f1(a & False, b & False) == 1
    assert metrics.canny_f1(a & False, b) == metrics.canny_f1(a, b & False) == 0
    line = np.zeros((9, 9), bool)
    line[4, 2:7] = True
    assert [metrics.canny_f1(np.roll(line, shift, 0), line) for shift in (1, -1, 2)] == [1, 1, 0]
    square = picture(0, 0, 0, size=64)
    square.paste((255, 255, 255), (16, 16, 48, 48))
    assert 100 < Canny()(square).sum() < 200
    metric = metrics.CannyF1(condition=lambda s: Canny().condition(square))
    assert metrics.score(metric, [shot(square), shot(picture(5, 5, 5, size=64))]).tolist() == [1, 0]


def test_there_is_one_canny_with_the_thresholds_and_the_colors_asked_for():
    image = noise(3)
    pixels = np.asarray(image)
    assert np.array_equal(Canny()(image), cv2.Canny(pixels, 100, 200) > 0)  # as controlnet-aux finds them
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    found = Canny(low=80, high=160, grey=True)
    assert np.array_equal(found(image), cv2.Canny(grey, 80, 160) > 0)
    assert np.array_equal(np.asarray(found.condition(image)), np.repeat(found(image)[..., None] * np.uint8(255), 3, 2))
    assert Canny.of(found.config) == found
    assert Canny.of({"_class_name": "ControlNetModel"}) == Canny()
    for wrong in ({"low": 200, "high": 100}, {"low": 0}, {"high": "much"}, {"high": float("nan")}, [80, 160], None):
        with pytest.raises(FormatError, match="_canny must hold low, high and grey"):
            Canny.of({"_canny": wrong})


def test_ms_ssim_is_one_for_equals_falls_with_noise_and_is_ssim_at_one_scale():
    from skimage.metrics import structural_similarity

    generator = np.random.default_rng(0)
    a = generator.random((20, 20))
    b = np.clip(a + generator.normal(0, 0.2, a.shape), 0, 1)
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    assert metrics.ms_ssim(a, b) == pytest.approx(structural_similarity(a, b, **options))
    big = np.kron(generator.random((16, 16)), np.ones((8, 8)))
    values = [metrics.ms_ssim(big, np.clip(big + generator.normal(0, s, big.shape), 0, 1)) for s in (0, 0.05, 0.2, 0.6)]
    assert values[0] == pytest.approx(1)
    assert values == sorted(values, reverse=True)
    assert values[-1] < 0.7
    with pytest.raises(GainsError, match="11 pixels"):
        metrics.ms_ssim(a[:5], b[:5])


def test_mask_iou_and_color_by_hand():
    wanted, found = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    wanted[:4], found[2:6] = True, True
    metric = metrics.MaskIoU(segment=lambda images: [found] * len(images), wanted=lambda s: wanted)
    assert metrics.score(metric, [shot(noise(0, 8))]) == pytest.approx([1 / 3])
    assert metrics.score(metrics.Saturation(), [shot(picture(255, 0, 0)), shot(picture(9, 9, 9))]).tolist() == [1, 0]
    assert metrics.score(metrics.Clipped(), [shot(picture(255, 0, 9)), shot(picture(9, 9, 9))]) == pytest.approx(
        [2 / 3, 0]
    )
    assert metrics.score(metrics.Contrast(), [shot(picture(9, 9, 9))]) == [0]
    histogram = metrics.color_histogram([picture(255, 0, 0)], bins=2)
    assert histogram.shape == (1, 8)
    assert histogram[0, 4] == 1


def test_a_metric_must_give_one_finite_number_per_image():
    for values, message in [([1.0], "expected one each"), ([1.0, np.inf], "infinite")]:
        with pytest.raises(GainsError, match=message):
            metrics.score(metrics.Measure("m", True, lambda shots, v=values: v), [shot(noise(0)), shot(noise(1))])
    with pytest.raises(GainsError, match=r"expected \(n, d\)"):
        metrics.Diversity(name="d", features=lambda images: np.ones(3))([shot(noise(0))])
    assert isinstance(metrics.Saturation(), metrics.Metric)


def test_references_are_looked_at_once_for_all_arms():
    looked = []

    def features(images):
        looked.append(len(images))
        return np.stack([np.asarray(image, float).mean((0, 1)) for image in images])

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(7)]
    shots = [Shot(prompt=str(i), seed=1, latents="0", image=picture) for i, picture in enumerate(pictures[:3])]
    for metric in (
        metrics.Kid(name="kid", features=features, references=pictures),
        metrics.Similarity(name="similarity", features=features, references=pictures),
    ):
        looked.clear()
        first = metric(shots)
        assert np.array_equal(metric(shots), first)
        assert sorted(looked) == [3, 3, 7]

"""Algebra of the pure parts: attention products, regions, scale maps, control arms."""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import fields

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import scfg
from scfg import GuidanceInputs, ScfgError, SemanticCFG, attention, make_guidance
from scfg.attention import apply_mean_attention, mean_attention
from scfg.regions import RegionAverage, Regions, complete, one_hot, smooth
from scfg.scale import dose, permute_regions

BATCH, HEADS, TOKENS, DEPTH = 2, 3, 20, 8


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projections(tokens=TOKENS):
    return random(BATCH, tokens, HEADS * DEPTH, seed=1), random(BATCH, tokens, HEADS * DEPTH, seed=2)


def textbook(query, key, scale):
    """(B, N, M) by the definition."""
    q, k = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key))
    return (scale * q @ k.mT).softmax(-1).mean(1)


@pytest.mark.parametrize("columns", [2, DEPTH, 21])  # narrower than a head, as wide, and several pieces
def test_three_ways_to_average_attention_agree(columns):
    query, key = projections()
    value = random(BATCH, TOKENS, columns, seed=3)
    expected = textbook(query, key, 0.3)
    explicit = mean_attention(query, key, heads=HEADS, scale=0.3)
    torch.testing.assert_close(explicit, expected)
    fused = apply_mean_attention(query, key, value, heads=HEADS, scale=0.3)
    torch.testing.assert_close(fused, expected @ value)


class Largest(TorchDispatchMode):
    """The largest tensor any operation makes, and the operations seen."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.add(func.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("columns", [2, 77])
def test_the_fused_product_forms_nothing_of_size_n_by_n(columns):
    query, key = projections(400)
    value = random(BATCH, 400, columns, seed=3)
    with Largest() as seen, sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where torch would take the math path
        apply_mean_attention(query, key, value, heads=HEADS, scale=0.3)
    assert any("flash_attention" in operation for operation in seen.operations)
    assert seen.elements < 400 * 400


def test_the_explicit_average_forms_one_matrix_per_image_never_one_per_head():
    query, key = projections(400)
    with Largest() as seen:
        mean_attention(query, key, heads=HEADS, scale=0.3)
    assert seen.elements == BATCH * 400 * 400


@pytest.mark.parametrize("at_once", [2, HEADS, 100])  # not a divisor of the heads, all, and more than there are
def test_heads_taken_together_are_heads_taken_in_turn(monkeypatch, at_once):
    query, key = projections()
    monkeypatch.setattr(attention, "_heads_at_once", lambda total: at_once)
    together = mean_attention(query, key, heads=HEADS, scale=0.3)
    torch.testing.assert_close(together, textbook(query, key, 0.3))


@pytest.mark.parametrize(("tokens", "at_once"), [(1024, 8), (4096, 1), (16384, 1)])
def test_a_gpu_takes_as_many_heads_as_the_limit_of_explicit_maps_holds(tokens, at_once):
    total = torch.empty(2, tokens, tokens, device="meta")
    assert attention._heads_at_once(total) == at_once
    assert at_once == 1 or at_once * total.numel() <= attention.EXPLICIT_LIMIT


def test_completion_is_the_published_and_the_papers_polynomial():
    own = random(BATCH, TOKENS, TOKENS).softmax(-1)
    cross = random(BATCH, TOKENS, 5, seed=4).softmax(-1)
    published = complete(own.matmul, cross, completion="published", steps=4)
    torch.testing.assert_close(published, (own @ cross + 3 * own @ own @ cross) / 4)
    paper = complete(own.matmul, cross, completion="paper", steps=4)
    powers = [torch.linalg.matrix_power(own, k) for k in range(1, 5)]
    torch.testing.assert_close(paper, sum(powers) / 4 @ cross)
    torch.testing.assert_close(complete(own.matmul, cross, completion="paper", steps=1), own @ cross)


def test_smoothing_has_the_published_kernel_and_keeps_constants():
    constant = torch.full((1, 2, 4, 5), 3.0)
    torch.testing.assert_close(smooth(constant, 0.5), constant)
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[0, 0, 2, 2] = 1.0
    line = torch.tensor([math.exp(-1.0), 1.0, math.exp(-1.0)])
    line /= line.sum()
    torch.testing.assert_close(smooth(impulse, 0.5)[0, 0, 1:4, 1:4], torch.outer(line, line))
    assert smooth(impulse, 0.0) is impulse


def test_ties_go_to_the_first_token_and_regions_cover_everything_once():
    average = RegionAverage((4, 4), sigma=0.5)
    average.add_tokens(torch.ones(1, 16, 3), (4, 4))
    average.add_pair(torch.ones(1, 16, 2), (4, 4))
    regions = average.regions()
    assert torch.equal(regions.index, torch.zeros(1, 4, 4, dtype=torch.long))
    assert not regions.foreground.any()  # a tie is background
    assert torch.equal(one_hot(regions.index, 3).sum(1), torch.ones(1, 4, 4))


def two_regions(foreground=True):
    """Left half token 0, right half token 2 of 4; the right half is foreground."""
    index = torch.zeros(BATCH, 4, 4, dtype=torch.long)
    index[:, :, 2:] = 2
    mask = index.bool() if foreground else torch.zeros_like(index).bool()
    return Regions(index=index, count=4, foreground=mask)


def predictions():
    uncond = random(BATCH, 4, 8, 8)
    return uncond, uncond + random(BATCH, 4, 8, 8, seed=9)


def inputs(uncond, cond, **rest):
    return GuidanceInputs(uncond=uncond, cond=cond, **rest)


def test_gamma_is_the_ratio_of_region_means_by_hand():
    uncond = torch.zeros(1, 4, 8, 8)
    cond = torch.zeros(1, 4, 8, 8)
    cond[:, 0, :, :4], cond[:, 0, :, 4:] = 1.0, 2.0
    index = two_regions().index[:1]
    regions = Regions(index=index, count=4, foreground=index.bool())
    result = SemanticCFG(smoothing_sigma=0)(inputs(uncond, cond, guidance_scale=5.0, regions=regions))
    assert torch.allclose(result.gamma[..., :4], torch.tensor(2.0))  # n_ref / n_left = 2 / 1
    assert torch.allclose(result.gamma[..., 4:], torch.tensor(1.0))
    assert result.norms.gamma[0].tolist() == pytest.approx([2.0, 0.0, 1.0, 0.0])
    assert result.norms.area[0].tolist() == [0.5, 0.0, 0.5, 0.0]
    assert result.effective.item() == pytest.approx((2 * 1 + 1 * 2) / (1 + 2))


def test_every_region_ends_with_the_references_mean_strength():
    uncond, cond = predictions()
    free = SemanticCFG(gamma_min=None, gamma_max=None, scale_cap=None, smoothing_sigma=0)
    result = free(inputs(uncond, cond, guidance_scale=5.0, regions=two_regions()))
    strength = (result.gamma[:, 0] * (cond - uncond).norm(dim=1)).unflatten(2, (2, 4)).mean(dim=(1, 3))
    torch.testing.assert_close(strength[:, 0], strength[:, 1])


def test_limits_hold_before_smoothing_and_the_cap_is_on_the_whole_scale():
    uncond, cond = predictions()
    kept = SemanticCFG(gamma_min=1.1, gamma_max=1.1, smoothing_sigma=0)
    assert (kept(inputs(uncond, cond, guidance_scale=5.0, regions=two_regions())).gamma == 1.1).all()
    capped = SemanticCFG(scale_cap=15.0, smoothing_sigma=0)
    assert capped(inputs(uncond, cond, guidance_scale=30.0, regions=two_regions())).gamma.max() <= 0.5


def test_an_empty_foreground_is_plain_cfg_or_what_the_published_code_does():
    uncond, cond = predictions()
    regions = two_regions(foreground=False)
    call = {"guidance_scale": 5.0, "regions": regions}
    assert (SemanticCFG()(inputs(uncond, cond, **call)).gamma == 1).all()
    torch.testing.assert_close(
        SemanticCFG.published()(inputs(uncond, cond, **call)).gamma, torch.full((BATCH, 1, 8, 8), 0.8)
    )
    off = SemanticCFG.published_if_stage2()(inputs(uncond, cond, **call))
    assert (off.gamma == 0).all()
    assert (off.effective == 0).all()


def test_the_mean_reference_needs_no_foreground():
    uncond, cond = predictions()
    bare = Regions(index=two_regions().index, count=4)
    SemanticCFG(reference="mean")(inputs(uncond, cond, guidance_scale=5.0, regions=bare))
    with pytest.raises(ScfgError, match="reference='mean'"):
        SemanticCFG()(inputs(uncond, cond, guidance_scale=5.0, regions=bare))


def test_dose_has_semantics_total_and_no_map():
    uncond, cond = predictions()
    call = {"guidance_scale": 5.0, "regions": two_regions()}
    semantic = SemanticCFG()(inputs(uncond, cond, **call))
    flat = make_guidance("dose")(inputs(uncond, cond, **call))
    torch.testing.assert_close(flat.gamma, semantic.effective[:, None, None, None].expand_as(flat.gamma))
    torch.testing.assert_close(dose(flat.gamma, (cond - uncond).norm(dim=1)), semantic.effective)


def test_placebo_has_semantics_total_and_swapped_regions():
    uncond, cond = predictions()
    free = SemanticCFG(gamma_min=None, gamma_max=None, smoothing_sigma=0)
    call = {"guidance_scale": 2.0, "regions": two_regions()}
    semantic = free(inputs(uncond, cond, **call))
    placebo = make_guidance("placebo", free)(inputs(uncond, cond, seeds=[1, 2], **call))
    score = (cond - uncond).norm(dim=1)
    torch.testing.assert_close(dose(placebo.gamma, score), semantic.effective)
    # two regions: the cycle swaps them, up to the common factor that restores the dose
    swapped = semantic.gamma.unflatten(3, (2, 4)).flip(3).flatten(3)
    ratio = placebo.gamma / swapped
    torch.testing.assert_close(ratio, ratio[..., :1, :1].expand_as(ratio))
    with pytest.raises(ScfgError, match="seed"):
        make_guidance("placebo")(inputs(uncond, cond, **call))


def test_placebo_does_not_depend_on_the_rest_of_the_batch():
    uncond, cond = predictions()
    index = torch.randint(0, 4, (BATCH, 4, 4), generator=torch.Generator().manual_seed(3))
    placebo = make_guidance("placebo")

    def call(images, seeds):
        regions = Regions(index=index[images], count=4, foreground=index[images] > 1)
        return placebo(inputs(uncond[images], cond[images], guidance_scale=5.0, regions=regions, seeds=seeds)).gamma

    torch.testing.assert_close(call(slice(0, 2), [11, 12])[1:], call(slice(1, 2), [12]))


@pytest.mark.parametrize("present", [1, 2, 3, 6])
def test_a_permutation_moves_every_present_region_and_no_absent_one(present):
    gamma = torch.arange(1.0, 9.0)[None]
    mask = torch.arange(8)[None] < present
    permuted = permute_regions(gamma, mask, [5])
    assert torch.equal(permuted[~mask], gamma[~mask])
    assert torch.equal(permuted[mask].sort().values, gamma[mask])
    if present > 1:
        assert (permuted[mask] != gamma[mask]).all()


def test_pointwise_levels_the_score_and_uses_no_regions():
    uncond, cond = predictions()
    free = make_guidance("pointwise", gamma_min=None, gamma_max=None, scale_cap=None, smoothing_sigma=0)
    gamma = free(inputs(uncond, cond, guidance_scale=5.0)).gamma
    strength = gamma[:, 0] * (cond - uncond).norm(dim=1)
    torch.testing.assert_close(strength, strength[:, :1, :1].expand_as(strength))
    assert not isinstance(free, SemanticCFG)


def test_interval_is_no_guidance_outside_and_untouched_inside():
    interval = make_guidance("interval", start=0.25, stop=0.5)
    assert [interval.active(f) for f in (0.0, 0.25, 0.49, 0.5)] == [True, False, False, True]
    uncond, cond = predictions()
    gamma = interval(inputs(uncond, cond, guidance_scale=4.0)).gamma
    torch.testing.assert_close(uncond + 4.0 * gamma * (cond - uncond), cond)


def test_kept_pixels_of_an_inpainting_do_not_count():
    uncond, cond = predictions()
    weight = torch.zeros(BATCH, 8, 8)
    weight[:, 2:6, 2:6] = 1.0
    call = {"guidance_scale": 5.0, "regions": two_regions(), "weight": weight}
    settings = SemanticCFG(smoothing_sigma=0)
    inside = weight[:, None].bool()
    first = settings(inputs(uncond, cond, **call))
    polluted = torch.where(inside, cond, 100 * cond)
    second = settings(inputs(uncond, polluted, **call))
    torch.testing.assert_close(first.gamma, second.gamma)
    torch.testing.assert_close(first.effective, second.effective)
    everywhere = settings(inputs(uncond, cond, guidance_scale=5.0, regions=two_regions()))
    full = settings(inputs(uncond, cond, guidance_scale=5.0, regions=two_regions(), weight=torch.ones(BATCH, 8, 8)))
    torch.testing.assert_close(everywhere.gamma, full.gamma)


def test_a_region_outside_the_repainted_part_keeps_plain_cfg():
    uncond, cond = predictions()
    weight = torch.zeros(BATCH, 8, 8)
    weight[:, :, 4:] = 1.0  # the right half, token 2
    result = SemanticCFG(smoothing_sigma=0)(
        inputs(uncond, cond, guidance_scale=5.0, regions=two_regions(), weight=weight)
    )
    assert (result.gamma[..., :4] == 1.0).all()
    assert result.norms.area[0].tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("latent_ratio", 0),
        ("latent_ratio", "fine"),
        ("completion", "none"),
        ("completion_steps", 0),
        ("empty_foreground", "zero"),
        ("foreground", "both"),
        ("tokens", "some"),
        ("reference", "max"),
        ("gamma_min", -1.0),
        ("gamma_max", 0.1),
        ("scale_cap", 0.0),
        ("smoothing_sigma", -1.0),
        ("start", 1.0),
        ("stop", 0.0),
        ("refresh_every", 0),
        ("last_blocks", 0),
    ],
)
def test_a_setting_out_of_range_is_named_with_its_value(setting, value):
    with pytest.raises(ScfgError) as caught:
        SemanticCFG(**{setting: value})
    assert setting in str(caught.value)
    assert str(value) in str(caught.value)


def test_names_and_their_errors():
    assert make_guidance("dose", SemanticCFG(gamma_max=2.0)).gamma_max == 2.0
    interval = make_guidance("interval", SemanticCFG(start=0.1, stop=0.9))
    assert (interval.start, interval.stop) == (0.2, 0.8)  # its window means something else
    with pytest.raises(ScfgError, match=r"'magic'.*placebo"):
        make_guidance("magic")
    with pytest.raises(ScfgError, match="no setting sharpness"):
        make_guidance("dose", sharpness=1)


def test_a_method_has_the_fields_that_mean_something_to_it():
    assert [field.name for field in fields(make_guidance("cfg", SemanticCFG(latent_ratio=4)))] == []
    tuned = make_guidance("pointwise", SemanticCFG(gamma_max=2.0), tokens="prompt")
    assert tuned.gamma_max == 2.0
    assert not hasattr(tuned, "tokens")
    with pytest.raises(ScfgError, match="latent_ratio=0"):  # a field that is left out is checked all the same
        make_guidance("cfg", latent_ratio=0)


def test_no_public_name_hides_a_module():
    for module in pkgutil.iter_modules(scfg.__path__):
        assert importlib.import_module(f"scfg.{module.name}") is getattr(scfg, module.name)


def test_shapes_are_checked_under_pytest():
    """The import hook of tests/conftest.py must have come before the first import of scfg."""
    with pytest.raises(Exception, match=r"(?i)type"):
        smooth(torch.ones(2, 3), 0.5)

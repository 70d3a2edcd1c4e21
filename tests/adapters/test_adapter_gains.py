"""The comparison: what it finds, what it refuses, and whether its intervals cover."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from adapters.errors import GainsError
from adapters.measuring import curves, gains, stats
from adapters.measuring.gains import Design
from adapters.measuring.table import Row, read_csv, write_csv

DESIGN = Design(
    arm="scfg",
    baseline="cfg",
    primary="fidelity",
    minimum_effect=0.05,
    higher_is_better={"fidelity": True, "burnt": False},
)


def table(differences, *, seeds=2, burnt=0.0, noise=0.0, seed=0, subjects=None) -> list[Row]:
    """Two arms on one prompt per cluster; `differences` are the clusters' true gaps."""
    generator, rows = np.random.default_rng(seed), []
    for index, gap in enumerate(differences):
        for s in range(seeds):
            level = generator.normal()
            for arm, value in (("cfg", level), ("scfg", level + gap + noise * generator.normal())):
                numbers = {"fidelity": value, "burnt": burnt * (arm == "scfg") + 0.01 * generator.normal()}
                subject = "" if subjects is None else subjects[index]
                rows.append(Row(arm=arm, prompt=f"p{index}", seed=s, latents=f"n{s}", subject=subject, numbers=numbers))
    return rows


def test_difference_and_interval_by_hand():
    result = gains.compare(table([0.1, 0.2, 0.3, 0.4]), DESIGN).primary
    half = scipy_stats.t.ppf(0.975, 3) * np.std([0.1, 0.2, 0.3, 0.4], ddof=1) / 2
    assert result.difference == pytest.approx(0.25)
    assert (result.low, result.high) == (pytest.approx(0.25 - half), pytest.approx(0.25 + half))
    assert (result.wins, result.ties, result.losses, result.method, result.clusters) == (8, 0, 0, "student-t", 4)


def test_seeds_do_not_count_as_clusters():
    few, many = (gains.compare(table([0.1, 0.2, 0.3], seeds=n), DESIGN).primary for n in (1, 50))
    assert few.clusters == many.clusters == 3
    assert (few.low, few.high) == (pytest.approx(many.low), pytest.approx(many.high))


def test_clusters_are_subjects_where_there_are_six():
    gaps = np.linspace(0.1, 0.5, 12)
    two = gains.compare(table(gaps, subjects=[f"s{i % 2}" for i in range(12)]), DESIGN)
    six = gains.compare(table(gaps, subjects=[f"s{i % 6}" for i in range(12)]), DESIGN)
    assert (two.counts["cluster"], two.primary.clusters) == ("prompt", 12)
    assert (six.counts["cluster"], six.primary.clusters) == ("subject", 6)


@pytest.mark.parametrize(
    ("gaps", "burnt", "word"),
    [
        ([0.2, 0.25, 0.3, 0.2, 0.22, 0.28], 0.0, "gain"),
        ([0.2, 0.25, 0.3, 0.2, 0.22, 0.28, 0.21, 0.23], 1.0, "trade-off"),
        ([-0.2, -0.25, -0.3, -0.2, -0.22, -0.28], 0.0, "harm"),
        ([0.2, -0.25, 0.3, -0.2, 0.22, -0.28], 0.0, "no detectable gain"),
        ([0.010, 0.011, 0.012, 0.010, 0.011, 0.012], 0.0, "no detectable gain"),
        ([0.0] * 6, 0.0, "no detectable gain"),
    ],
)
def test_verdicts(gaps, burnt, word):
    assert gains.compare(table(gaps, burnt=burnt), DESIGN).verdict.word == word


def test_lower_can_be_better():
    design = replace(DESIGN, primary="burnt", minimum_effect=0.5)
    assert gains.compare(table([0.0] * 6, burnt=-1.0), design).verdict.word == "gain"
    assert gains.compare(table([0.0] * 6, burnt=1.0), design).verdict.word == "harm"


def test_referee_must_agree():
    rows = table([0.2, 0.25, 0.3, 0.2, 0.22, 0.28], burnt=1.0)
    design = replace(DESIGN, referee="burnt")
    verdict = gains.compare(rows, design).verdict
    assert verdict.word == "no detectable gain"
    assert "referee" in verdict.sentence


def test_worst_five_are_the_largest_losses():
    worst = gains.compare(table([-0.5, 0.1, 0.2, -0.1, 0.3, 0.4, 0.5], seeds=1), DESIGN).worst
    assert [w["prompt"] for w in worst] == ["p0", "p3", "p1", "p2", "p4"]
    assert worst[0]["difference"] == pytest.approx(-0.5)


@pytest.mark.parametrize("change", [{"latents": "other"}, {"seed": 99}, {"prompt": "p0 "}])
def test_arms_that_do_not_join_are_an_error(change):
    rows = table([0.1, 0.2, 0.3])
    rows[1] = replace(rows[1], **change)
    with pytest.raises(GainsError, match="do not join"):
        gains.compare(rows, DESIGN)


def test_missing_and_double_images_are_errors():
    rows = table([0.1, 0.2, 0.3])
    with pytest.raises(GainsError, match="do not join"):
        gains.compare(rows[:-1], DESIGN)
    with pytest.raises(GainsError, match="two images"):
        gains.compare([*rows, rows[-1]], DESIGN)
    with pytest.raises(GainsError, match="no images of arm 'other'"):
        gains.compare(rows, replace(DESIGN, baseline="other"))
    with pytest.raises(GainsError, match="has no 'fidelity'"):
        gains.compare([replace(r, numbers={"burnt": 0.0}) for r in rows], DESIGN)


def test_unjudged_images_leave_their_pair_out_and_are_counted():
    rows = table([0.1, 0.2, 0.3, 0.4])
    rows[0] = replace(rows[0], numbers={**rows[0].numbers, "fidelity": math.nan})
    result = gains.compare(rows, DESIGN).primary
    assert (result.failures, result.pairs, result.clusters) == (1, 7, 4)


@pytest.mark.parametrize(
    "settings", [{"minimum_effect": 0.0}, {"baseline": "scfg"}, {"primary": "x"}, {"referee": "x"}, {"confidence": 1.0}]
)
def test_designs_that_mean_nothing_are_refused(settings):
    with pytest.raises(GainsError):
        replace(DESIGN, **settings)


def test_holm_by_hand_and_bounds():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([]) == []


def test_wilcoxon_with_six_clusters_cannot_go_below_a_thirtysecond():
    assert stats.wilcoxon([1, 2, 3, 4, 5, 6]) == pytest.approx(1 / 32)
    assert stats.wilcoxon([0, 0, 0]) == 1


@pytest.mark.parametrize("clusters", [5, 9, 14])
def test_wilcoxon_is_scipys_with_ties_and_zeros(clusters):
    values = np.random.default_rng(clusters).integers(-2, 4, clusters) / 8
    assert stats.wilcoxon(values) == pytest.approx(scipy_stats.wilcoxon(values).pvalue, abs=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.builds(
            Row,
            arm=st.sampled_from(["a", "b"]),
            prompt=st.text(max_size=20),
            subject=st.text(max_size=5),
            seed=st.integers(0, 2**63),
            latents=st.text("0123456789abcdef", min_size=1, max_size=4),
            seconds=st.floats(0, 1e6),
            numbers=st.dictionaries(st.sampled_from(["m", 'n, "x"']), st.floats(allow_nan=False, allow_infinity=False)),
        ),
        max_size=5,
    )
)
def test_the_table_survives_csv_exactly(rows):
    assert read_csv(write_csv(rows)) == rows


def test_everything_follows_from_the_table():
    rows = table(np.linspace(-0.1, 0.4, 12), noise=0.1)
    assert gains.compare(read_csv(write_csv(rows)), DESIGN).to_dict() == gains.compare(rows, DESIGN).to_dict()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x,,p,seven,n,,0.0,1,1", "'seed' is 'seven', expected a whole number"),
        ("x,,p,1\x1b[2J,n,,0.0,1,1", r"'seed' is '1.x1b.2J', expected a whole number"),
        ("x,,p,1,n,,0.0,\x00,1", r"'burnt' is '\\x00', expected a number"),
        ("x,,p,1,n,,0.0", "7 cells under 9 columns"),
        ("x,,p\r,1,n,,0.0,1,1", "3 cells under 9 columns"),
        ("x,,p,1,n,,0.0,1,1,1", "10 cells under 9 columns"),
        ("", "0 cells under 9 columns"),
        ('x,,"p,1,n,,0.0,1,1', "a quote is opened and never closed"),
        (f"x,,{'p' * 140_000},1,n,,0.0,1,1", "a cell of more than 131072 characters"),
        (f"x,,p,{'9' * 140},n,,{'9' * 5000}.x,1,1", r"'seconds' is '9+…, expected a number"),
        ("x,,p\udcff,1,n,,0.0,1,1", "the byte 0xff is not UTF-8"),
    ],
)
def test_a_line_that_is_none_is_named(line: str, said: str, tmp_path: Path):
    good = write_csv([replace(row, prompt=f"two\nlines {row.prompt}") for row in table([0.1, 0.2])])
    (tmp_path / "mine.csv").write_bytes(f"{good}{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(GainsError, match=rf"mine\.csv, line 18: {said}") as error:
        read_csv(tmp_path / "mine.csv")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("text", ["", "a,b\n"])
def test_malformed_tables_are_errors(text):
    with pytest.raises(GainsError, match="per-image table, line 1: the columns start with"):
        read_csv(text)


@pytest.mark.parametrize(
    "change",
    [
        *({"primary": None}, {"arm": 1}, {"baseline": ["CFG"]}, {"referee": 0}, {"identity": {}}, {"cluster": "seed"}),
        *({"minimum_effect": "1"}, {"minimum_effect": True}, {"confidence": None}, {"tolerance": "x"}),
        *({"higher_is_better": []}, {"higher_is_better": {"fidelity": "up"}}, {"plain": "scfg"}, {"plain": [None]}),
    ],
)
def test_a_design_of_other_values_is_refused_by_name(change):
    with pytest.raises(GainsError, match=f"^{next(iter(change))}="):
        replace(DESIGN, **change)


def sweep_rows(effective: float) -> tuple[list[Row], dict[str, str]]:
    sweep, rows = {"1": "cfg1", "3": "cfg3", "9": "cfg9"}, []
    for prompt in range(4):
        key = {"prompt": f"p{prompt}", "seed": 0, "latents": "n"}
        rows += [Row(arm=arm, numbers={"fidelity": float(s) ** 2}, **key) for s, arm in sweep.items()]
        rows.append(Row(arm="scfg", numbers={"fidelity": 5.0 + prompt, "effective": effective}, **key))
    return rows, sweep


def test_equal_effective_scale_interpolates_and_never_extrapolates():
    rows, sweep = sweep_rows(2.0)
    matched = curves.at_effective_scale(rows, "scfg", sweep, ["fidelity"], name="cfg matched", recorded="effective")
    assert [r.numbers["fidelity"] for r in matched] == [5.0] * 4  # halfway between 1 and 9
    design = Design(
        arm="scfg", baseline="cfg matched", primary="fidelity", minimum_effect=0.1, higher_is_better={"fidelity": True}
    )
    assert gains.compare([*rows, *matched], design).primary.difference == pytest.approx(1.5)
    rows, sweep = sweep_rows(10.0)
    with pytest.raises(GainsError, match="outside the sweep"):
        curves.at_effective_scale(rows, "scfg", sweep, ["fidelity"], name="x", recorded="effective")
    with pytest.raises(GainsError, match="no sweep"):
        curves.at_effective_scale(rows, "scfg", {}, ["fidelity"], name="x", recorded="effective")


def test_curves_are_ordered_by_scale():
    rows, sweep = sweep_rows(2.0)
    design = Design(
        arm="scfg",
        baseline="cfg3",
        primary="fidelity",
        minimum_effect=0.1,
        higher_is_better={"fidelity": True},
        sweeps={"cfg": dict(reversed(sweep.items()))},
    )
    curve = gains.compare(rows, design).curves["cfg"]
    assert [(p["scale"], p["metrics"]["fidelity"]["mean"]) for p in curve] == [(1, 1), (3, 9), (9, 81)]


# ---------------------------------------------------------------------------------------------- calibration


def study(clusters: int, effect: float, generator: np.random.Generator) -> list[Row]:
    """Four seeds per cluster; clusters differ in their true effect (sd 1), images scatter around it (sd 1)."""
    rows = []
    for index, gap in enumerate(effect + generator.normal(size=clusters)):
        for s in range(4):
            level = 3 * generator.normal()
            key = {"prompt": f"p{index:03d}", "seed": s, "latents": f"n{s}"}
            rows.append(Row(arm="cfg", numbers={"m": level}, **key))
            rows.append(Row(arm="scfg", numbers={"m": level + gap + generator.normal()}, **key))
    return rows


def calibration(clusters: int, studies: int, effect: float) -> tuple[float, float, float]:
    """(coverage, share called gain, share called harm) of simulated studies."""
    design = Design(arm="scfg", baseline="cfg", primary="m", minimum_effect=0.01, higher_is_better={"m": True})
    generator = np.random.default_rng(clusters)
    results = [gains.compare(study(clusters, effect, generator), design) for _ in range(studies)]
    covered = np.mean([r.primary.low <= effect <= r.primary.high for r in results])
    words = [r.verdict.word for r in results]
    return float(covered), words.count("gain") / studies, words.count("harm") / studies


@pytest.mark.parametrize("clusters", [6, 30])
def test_calibration_in_small(clusters):
    covered, gain, harm = calibration(clusters, 150, 0.0)
    assert 0.90 <= covered <= 0.99  # three standard errors of 150 studies
    assert gain <= 0.064
    assert harm <= 0.064


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [6, 12, 30, 100])
def test_calibration(clusters):
    covered, _, harm = calibration(clusters, 1000, 0.5)
    assert 0.93 <= covered <= 0.97
    assert harm <= 0.035
    covered, gain, harm = calibration(clusters, 1000, 0.0)
    print(f"{clusters} clusters: coverage {covered:.3f}, called gain {gain:.3f}, called harm {harm:.3f}")
    assert 0.93 <= covered <= 0.97
    assert gain <= 0.035
    assert harm <= 0.035

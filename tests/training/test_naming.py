"""What is mistyped is named as it was typed, with what was meant."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from training import naming
from training.command_line import parse
from training.config import BaseSettings, TrainSettings
from training.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class Arm:
    """An arm."""

    method: Literal["cfg", "semantic"] = "semantic"
    scale: float = field(default=7.5, metadata={"was": "strength"})


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan."""

    seeds: list[int] = field(default_factory=lambda: [1])
    title: str = field(default="", metadata={"was": "heading"})
    arms: dict[str, Arm] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A recipe of the test."""

    base: BaseSettings
    train: TrainSettings = field(default_factory=TrainSettings)
    measure: Plan | None = None
    """What is compared."""
    out: str = "x"
    """Folder of the run."""


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--train.step=3", r"^--train.step: there is no such setting; did you mean --train.steps\?$"),
        ("--trian.steps=3", r"^--trian: there is no such setting; did you mean --train\?$"),
        ("--guidance.method=cfg", "^--guidance: there is no such setting$"),
        ("--train.zzz=3", "^--train.zzz: there is no such setting; --train has steps, batch_size, "),
        ("--measure.seedz=[3]", r"^--measure.seedz: .*did you mean --measure.seeds\?$"),
        ('--measure.arms={"A": {"scal": 3}}', r"^--measure.arms.A.scal: .*did you mean --measure.arms.A.scale\?$"),
        ("--measure.arms.A.scal=3", r"^--measure.arms.A.scal: .*did you mean --measure.arms.A.scale\?$"),
        ("--train.steps=abc", "^train.steps: expected int, got abc$"),
        ("--measure.seeds=abc", "^measure.seeds: expected .*, got abc$"),
        (
            '--measure.arms={"A": {"method": "cgf"}}',
            r"^measure.arms.*expected one of cfg, semantic, got cgf; did you mean",
        ),
        ("--measure={bad: [", r"^--measure: \{bad: \[ is neither JSON nor YAML"),
        ("--measure.arms={bad: [", r"^--measure.arms: \{bad: \[ is neither JSON nor YAML"),
        ("--train.steps=0", "^train.steps must be at least 1, got 0$"),
    ],
)
def test_a_flag(flag: str, said: str) -> None:
    with pytest.raises(TrainingError, match=said) as raised:
        parse(Settings, ["--base.path=pocket", flag])
    assert "class_path" not in str(raised.value)
    assert "<class" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {stepz: 3}", r"^train.stepz: .*did you mean train.steps\?$"),
        ("measure: {arms: {A: {scal: 3}}}", r"^measure.arms.A.scal: .*did you mean measure.arms.A.scale\?$"),
        ("bas: {path: x}", r"^bas: .*did you mean base\?$"),
    ],
)
def test_a_key_of_a_config(text: str, said: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(TrainingError, match=said):
        parse(Settings, [f"--config={config}", "--base.path=pocket"])


def test_what_is_right_passes() -> None:
    given = ["--base.path=pocket", '--measure.arms={"A": {"scale": 3}}', "--measure.seeds+=2", "--train.steps=3"]
    read = parse(Settings, given)
    assert read.measure is not None
    assert (read.measure.arms["A"].scale, read.train.steps) == (3.0, 3)
    assert parse(Settings, ["--base.path=pocket", "--measure=null"]).measure is None
    assert {"train.steps", "measure.arms", "base"} <= set(naming.names(Settings))


@pytest.mark.parametrize("in_a_file", [False, True])
@pytest.mark.parametrize(
    ("flag", "text"),
    [
        ("--measure.arms.A.strength=3", "arms: {A: {strength: 3}}"),
        ('--measure.arms={"A": {"strength": 3}}', "arms: {A: {strength: 3}}"),
        ('--measure={"arms": {"A": {"strength": 3}}}', "arms: {A: {strength: 3}}"),
        ("--measure.heading=#1 dog", "heading: on"),
    ],
)
def test_a_name_of_before_is_accepted_with_a_note(
    flag: str, text: str, in_a_file: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    naming.note.cache_clear()
    config = tmp_path / "config.yaml"
    config.write_text(f"measure: {{{text}}}")
    read = parse(Settings, ["--base.path=pocket", f"--config={config}" if in_a_file else flag]).measure
    assert read is not None
    old, new = ("heading", "title") if "heading" in flag else ("strength", "scale")
    said = capsys.readouterr().err
    assert said == f"note: {old} is now called {new}; the old name still works in this version\n"
    if old == "heading":  # a text is a text under its old name too
        assert read.title == ("on" if in_a_file else "#1 dog")
    else:
        assert read.arms["A"].scale == 3.0


def test_a_flag_and_its_value_may_stand_apart_under_a_name_of_before() -> None:
    read = parse(Settings, ["--base.path=pocket", "--measure.arms", '{"A": {"strength": 3}}']).measure
    assert read is not None
    assert read.arms["A"].scale == 3.0


def test_a_setting_under_both_names_is_an_error() -> None:
    said = r"^--measure.arms.A.strength is the old name of --measure.arms.A.scale; give one of them$"
    with pytest.raises(TrainingError, match=said):
        parse(Settings, ["--base.path=pocket", '--measure.arms={"A": {"scale": 3, "strength": 3}}'])


def test_help_is_short_first(capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for arguments in (["--help"], ["--help", "all"]):
        with pytest.raises(SystemExit):
            parse(Settings, arguments)
        said.append(capsys.readouterr().out)
    assert "A recipe of the test." in said[0]
    assert "--out  " in said[0]
    assert "Folder of the run." in said[0]
    assert len(said[0].splitlines()) < 20
    assert "--help all shows all" in said[0]
    assert "--train.save_every" in said[1]
    assert "--train.save_every" not in said[0]

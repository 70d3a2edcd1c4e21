"""Settings: read from files and overrides, refused by name, saved so that they can be read again."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from training import command_line, config
from training.errors import Stopped, TrainingError, exit_on_error


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A recipe's settings."""

    base: config.BaseSettings
    """The base."""
    out: str = "runs/x"
    """Output folder."""
    lora: config.LoraSettings = field(default_factory=config.LoraSettings)
    """LoRA."""
    train: config.TrainSettings = field(default_factory=config.TrainSettings)
    """Loop."""


def test_files_come_in_order_and_overrides_win_wherever_they_stand(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("base: {path: some}\ntrain: {steps: 7, optimizer_args: {betas: [0.9, 0.99]}}\nlora: {rank: 2}\n")
    two.write_text("train: {steps: 8, ema: 0.99}\n")
    read = command_line.parse(Settings, ["--lora.rank=3", "--config", str(one), f"--config={two}", "--out", "here"])
    assert (read.base.path, read.train.steps, read.train.ema, read.lora.rank, read.out) == ("some", 8, 0.99, 3, "here")
    assert read.train.optimizer_args == {"betas": [0.9, 0.99]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora.rnak", "3"], "rnak"),
        (["--lora.rank", "many"], r"(?s)lora.rank.*many"),
        (["--lora.rank", "0"], "lora.rank must be at least 1, got 0"),
        (["--train.clip", "-1"], "train.clip must be > 0"),
        (["--train.schedule", "zigzag"], "zigzag"),
        (["--lora.kind", "loha", "--lora.dora", "true"], "lora.dora belong to lora.kind: lora, not loha"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_settings_are_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        command_line.parse(Settings, ["--base.path", "x", *arguments])


def test_a_typo_in_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: {path: x}\ntrain: {stepz: 3}\n")
    with pytest.raises(TrainingError, match="stepz"):
        command_line.parse(Settings, ["--config", str(tmp_path / "a.yaml")])


def test_what_is_missing_is_named() -> None:
    with pytest.raises(TrainingError, match=r"base"):
        command_line.parse(Settings, [])


def test_saved_settings_read_back_equal(tmp_path: Path) -> None:
    changes = ["--base.path", "x", "--train.optimizer_args", "{lr: 1}", "--lora.targets", "[to_q, to_k]"]
    read = command_line.parse(Settings, changes)
    config.write_settings(config.resolved(read), tmp_path / "settings.yaml")
    assert command_line.parse(Settings, ["--config", str(tmp_path / "settings.yaml")]) == read


def test_help_has_a_line_for_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.parse(Settings, ["--help", "all"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "--lora.rank RANK Rank of the weight update. Higher: more capacity, larger files. (type: int, default: 8)"
        in text
    )
    assert "Optimizer steps." in text


def test_the_resolved_settings_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_line.parse(Settings, ["--base.path", "x", "--print_config"])
    assert "rank: 8" in capsys.readouterr().out


def test_error_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused, exit_on_error():
        raise TrainingError("lora.rank is wrong")
    assert refused.value.code == 2
    assert capsys.readouterr().err == "error: lora.rank is wrong\n"
    with pytest.raises(SystemExit) as stopped, exit_on_error():
        raise Stopped("stopped after step 3")
    assert stopped.value.code == 130
    with pytest.raises(ZeroDivisionError), exit_on_error():
        _ = 1 / 0


def test_settings_and_the_package_load_neither_torch_nor_diffusers() -> None:
    program = "import sys, training, training.config, training.pocket; print({'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_one_prompt_may_be_given_alone(tmp_path: Path) -> None:
    from recipes import measure, sample

    text = "a red dog: and a [blue] cat"
    for words in (["--prompts", text], [f"--prompts={text}"]):
        assert command_line.parse(sample.Settings, ["--base.path=pocket", "--out=x", *words]).prompts == [text]
    listed = command_line.parse(sample.Settings, ["--base.path=pocket", "--out=x", "--prompts=[a dog, a cat]"])
    assert listed.prompts == ["a dog", "a cat"]
    file = tmp_path / "mine.yaml"
    file.write_text("base: {path: pocket}\nout: x\nmeasure: {prompts: a dog, drift_prompts: a car}\n")
    plan = command_line.parse(measure.Settings, [f"--config={file}"]).measure
    assert (plan.prompts, plan.drift_prompts) == (["a dog"], ["a car"])
    nested = command_line.parse(measure.Settings, ["--base.path=pocket", "--out=x", '--measure={"prompts": "a dog"}'])
    assert nested.measure.prompts == ["a dog"]

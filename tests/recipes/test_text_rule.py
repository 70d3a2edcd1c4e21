"""One rule for text from the first caption to the card, and a word where an adapter is drawn with another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_kinds import COMPARED, PROMPTED, trained

from adapters import files, text
from adapters.text import TextRule

RULE = ["--base.clip_skip=2", "--base.prompt_chunks=2"]
PLAIN = ["--sampling.steps=1", "--prompts=[a dog]"]


@pytest.fixture(scope="module")
def made(models: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [models, photos, tmp_path_factory.mktemp("ruled")]


def test_a_run_keeps_its_rule_to_the_card(made: list[Path], done, call) -> None:
    models, photos, out = made
    release = trained(done, models, photos, out, "dreambooth_lora", *RULE, "--lora.rank=2")
    rule = TextRule(clip_skip=2, chunks=2)
    assert text.rule_in(release) == text.rule_in(out / "lora") == rule
    assert all(text.rule_in(place) == rule for place in (out / "snapshots").iterdir())
    assert "clip-skip 2, prompts of up to 150 tokens" in (release / "README.md").read_text("utf-8")
    assert files.read_json(out / "measured" / "gains.json")["facts"]["text"].startswith("clip-skip 2")
    base = f"--base.path={models / 'sd15'}"
    done("sample", base, *RULE, *PLAIN, f"--adapter={release}", f"--out={out / 'drawn'}")
    for name, more in (("sample", PLAIN), ("measure", [*COMPARED, *PROMPTED[1:], "--dry_run=true"])):
        said = call(name, base, *more, f"--adapter={release}", f"--out={out / 'other'}")
        assert said.code == 2
        errors = [line for line in said.err.splitlines() if line.strip()]
        assert len(errors) == 1, said.err
        assert errors[0].startswith(f"error: adapter {release} was trained with clip-skip 2")
        assert errors[0].endswith("set base.clip_skip 2 and base.prompt_chunks 2")


def test_pictures_of_another_rule_are_not_taken(models: Path, done, call, tmp_path: Path) -> None:
    base, out = f"--base.path={models / 'sd15'}", f"--out={tmp_path / 'out'}"
    done("sample", base, *PLAIN, out)
    said = call("sample", base, *PLAIN, *RULE, out)
    assert said.code == 2
    assert "was sampled with other settings (text)" in said.err
    assert json.dumps(TextRule().to_config()) == '{"clip_skip": null, "chunks": 1}'

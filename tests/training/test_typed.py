"""Texts in settings arrive as they were typed, on the command line and in configs; what YAML would cut is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from training import command_line, config
from training.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of every form that a setting has."""

    data: config.DataSettings = field(default_factory=lambda: config.DataSettings(source="x"))
    """Optional texts, in a group."""
    plain: str = "p"
    """A text."""
    prompts: list[str] = field(default_factory=list)
    """Several."""
    maybe: list[str] | None = None
    """Several or none."""
    words: dict[str, str] = field(default_factory=dict)
    """By name."""
    steps: int = 3
    """No text."""


ODD = [
    *(
        "#1 dog",
        "dog #1",
        "dog # one",
        "---",
        "--- dog",
        "...",
        "&x",
        "&x dog",
        "*x",
        "!x",
        "!!null",
        "~",
        "Null",
        "yes",
    ),
    *("1", "1e3", "0x10", "1:30", "2024-01-01", ".nan", "- dog", "[V]", "[V] dog", "{dog}", "{}", "sks dog: red", "@x"),
    *(
        "%x",
        "`x`",
        "? x",
        "| x",
        "> x",
        '"a" b',
        "it's",
        " x ",
        "café ☕ 犬",
        "(masterpiece:1.2)",
        "a, b",
        "\\n",
        "a\tb",
    ),
]


@pytest.mark.parametrize("text", ODD)
def test_on_the_command_line(text: str) -> None:
    read = command_line.parse(Texts, [f"--data.prompt={text}", f"--plain={text}", "--maybe+=a", f"--maybe+={text}"])
    assert (read.data.prompt, read.plain) == (text, text)
    assert read.maybe == (["a", "V"] if text == "[V]" else ["a", text])  # a list adds its members
    if not text.startswith("--"):
        assert command_line.parse(Texts, ["--data.prompt", text]).data.prompt == text


@pytest.mark.parametrize("text", [*ODD, "NULL", "on\n\noff: # x"])
def test_what_is_written_reads_back(text: str, tmp_path: Path) -> None:
    made = Texts(
        data=config.DataSettings(source="x", prompt=text),
        plain=text,
        prompts=[text],
        maybe=[text, "b"],
        words={text: text},
    )
    config.write_settings(config.resolved(made), tmp_path / "settings.yaml")
    assert command_line.parse(Texts, ["--config", str(tmp_path / "settings.yaml")]) == made


def text_settings(kind: type, place: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(kind).items():
        if hint in (str, str | None):
            yield f"{place}{name}"
        elif dataclasses.is_dataclass(hint):
            yield from text_settings(hint, f"{place}{name}.")


@pytest.mark.parametrize("recipe", ["dreambooth_lora", "sample"])
def test_every_text_setting_arrives_or_is_refused_by_its_value(recipe: str) -> None:
    kind = importlib.import_module(f"recipes.{recipe}").Settings
    needed = {"base.path", "out"} | ({"data.source"} if recipe == "dreambooth_lora" else set())
    tried = list(text_settings(kind))
    assert needed <= set(tried)
    for name in tried:
        try:
            read: typing.Any = command_line.parse(kind, [*(f"--{other}=x" for other in needed), f"--{name}=#1 dog"])
        except TrainingError as error:
            if "#1 dog" in str(error):
                continue
            raise
        for part in name.split("."):
            read = getattr(read, part)
        assert read == "#1 dog", name


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        *(("1", "1"), ("1e3", "1e3"), ("yes", "yes"), ("2024-01-01", "2024-01-01"), ("0x10", "0x10"), ("---", "---")),
        *(("'#1 dog'", "#1 dog"), ('"&x"', "&x"), ("dog  # a comment", "dog"), ("# a comment", None), ("", None)),
        *(
            ("null", None),
            ("~", None),
            ("a\n    b", "a b"),
            ("|\n    a # b", "a # b\n"),
            ("&it dog\n  masks: *it", "dog"),
        ),
    ],
)
def test_in_a_config(typed: str, text: str | None, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"data:\n  source: x\n  prompt: {typed}\n")
    assert command_line.parse(Texts, ["--config", str(tmp_path / "c.yaml")]).data.prompt == text


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("prompt: #1 dog", "line 3: data.prompt: YAML takes #1 dog for a comment; put the text in quotes"),
        ("prompt: the #1 dog", "line 3: data.prompt: YAML takes #1 dog for a comment; put the text in quotes"),
        ("prompt: &x", "line 3: data.prompt: YAML takes &x for an anchor's name; put the text in quotes"),
        ("prompt: &x dog", "line 3: data.prompt: YAML takes &x for an anchor's name; put the text in quotes"),
        ("prompt: [V]", r"line 3: data.prompt: YAML takes \[V\] for a list; put the text in quotes"),
        ("prompt: {dog}", "line 3: data.prompt: YAML takes {dog} for a mapping; put the text in quotes"),
        ("prompt: 'null'", "line 3: data.prompt: the text null means that nothing is set"),
        *(
            (f"prompt: {text}", "line 3: .* needs quotes")
            for text in ("[V] dog", "a: b", "*", "@x", "!x", "- dog", "%x")
        ),
        ("? [a]\n  : b", "line 3: found unhashable key"),
        ("prompt: ''", "data.prompt is empty; write a caption"),
        ("prompt: '  '", "data.prompt is empty; write a caption"),
    ],
)
def test_what_yaml_would_leave_out_is_refused_with_its_line(typed: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"data:\n  source: x\n  {typed}\n")
    with pytest.raises(TrainingError, match=said) as raised:
        command_line.parse(Texts, ["--config", str(tmp_path / "c.yaml")])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[a]", "a", "3", "- a: b"])
def test_a_config_without_names_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(TrainingError, match=r"c.yaml: settings are written as `name: value`, one a line$"):
        command_line.parse(Texts, ["--config", str(tmp_path / "c.yaml")])


def test_lists_and_names_are_texts_too(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("prompts: [1, yes, 1e3]\nwords: {1: no}\nmaybe:\n- #1 dog\n")
    with pytest.raises(TrainingError, match="line 4: maybe: YAML takes #1 dog"):
        command_line.parse(Texts, ["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "c.yaml").write_text("prompts: [1, yes, 1e3]\nwords: {1: no}\n")
    read = command_line.parse(Texts, ["--config", str(tmp_path / "c.yaml")])
    assert (read.prompts, read.words) == (["1", "yes", "1e3"], {"1": "no"})


def test_a_value_of_dashes_needs_an_equals_sign() -> None:
    for text in ("---", "-- dog"):
        with pytest.raises(TrainingError, match=f"^{text}: a value that begins with -- needs an equals sign"):
            command_line.parse(Texts, ["--data.prompt", text])


@hypothesis_settings(max_examples=15, deadline=None)
@example("{")
@given(st.text(min_size=1, max_size=12).filter(lambda text: text.strip() not in ("", "null") and "\0" not in text))
def test_any_text(text: str) -> None:
    try:
        yaml.safe_load(yaml.safe_dump(text))
        text.encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return  # YAML itself has no such letters
    assert command_line.parse(Texts, [f"--data.prompt={text}"]).data.prompt == text


@pytest.mark.parametrize("letter", ["\udce9", "\0"])
def test_letters_that_no_file_can_hold_are_refused_by_the_setting(letter: str, tmp_path: Path) -> None:
    """They would come to light when the first table is written."""
    for words in ([f"--data.source=rex{letter}"], ["--prompts", f"rex{letter}"]):
        with pytest.raises(TrainingError, match=r"rex.*' (is not UTF-8|holds a zero byte)"):
            command_line.parse(Texts, words)
    (tmp_path / "mine.yaml").write_text('words: {"a": "\\0"}\n', "utf-8")
    with pytest.raises(TrainingError, match=r"^words.a .* holds a zero byte"):
        command_line.parse(Texts, ["--config", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(("word", "deep"), [("--words={}", "{a: " * 1500), ("--prompts={}", "[" * 1500 + "]" * 1500)])
def test_what_is_nested_thousands_deep_is_refused(word: str, deep: str, tmp_path: Path) -> None:
    with contextlib.suppress(TrainingError):
        command_line.parse(Texts, [word.format(deep)])
    (tmp_path / "mine.yaml").write_text(f"words: {deep}\n", "utf-8")
    with pytest.raises(TrainingError, match=r"mine\.yaml"):
        command_line.parse(Texts, ["--config", str(tmp_path / "mine.yaml")])

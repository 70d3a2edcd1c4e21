"""What the documents say: links and anchors exist, quoted messages are in the code, names in Python blocks too."""

from __future__ import annotations

import ast
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

from docs.house import imports_in

ROOT = Path(__file__).resolve().parents[1]
OWN = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "benchmarks" / "study" / "README.md",
    ROOT / "recipes" / "zoo" / "README.md",
]
ROOMS = ("scfg", "adapters", "training", "recipes")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text("utf-8")))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text("utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", OWN, ids=relative)
def test_every_link_and_anchor_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{relative(page)} links to {link}"
        assert not anchor or anchor in anchors(target), f"{relative(page)}: {link} names no heading of {target.name}"


@pytest.mark.parametrize("page", [page for page in OWN if page.name != "CHANGELOG.md"], ids=relative)
def test_lines_of_prose_are_at_most_120_wide(page: Path) -> None:
    for line in FENCE.sub("", page.read_text("utf-8")).splitlines():
        assert len(line) <= 120 or line.startswith(("|", "![")), f"{relative(page)}: {line}"


@cache
def strings_of_the_code() -> list[str]:
    """Every string constant of the rooms; what an f-string fills in is a NUL."""
    found = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def messages() -> list[tuple[str, str]]:
    """Messages that pages quote: `error: ...`, and the first column of the table of messages."""
    found = []
    for page in OWN:
        text = page.read_text("utf-8")
        found += [(relative(page), quoted) for quoted in re.findall(r"`error: ([^`]+)`", text)]
    section = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8").split("## Messages")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
    return found + [("docs/troubleshooting.md", row.removeprefix("error: ")) for row in rows]


def test_messages_that_pages_quote_are_in_the_code() -> None:
    quoted = [(page, message) for page, message in messages() if message.strip(". ")]
    assert len({message for _, message in quoted}) >= 8
    for page, message in quoted:
        pattern = re.compile(".+".join(re.escape(part.strip()) for part in message.split("...")), flags=re.DOTALL)
        assert any(pattern.search(text) for text in strings_of_the_code()), f"{page} quotes {message!r}"


def named(code: str) -> set[str]:
    """Dotted names of this project that a piece of Python uses through its imports, such as scfg.attach."""
    known: dict[str, str] = {}
    used = set()
    for node in imports_in(code):
        for alias in node.names:
            source = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            known[alias.asname or alias.name] = source
            used.add(source)
    for node in ast.walk(ast.parse(code)):
        words, inner = [], node
        while isinstance(inner, ast.Attribute):
            words.append(inner.attr)
            inner = inner.value
        if words and isinstance(inner, ast.Name) and inner.id in known:
            used.add(".".join([known[inner.id], *reversed(words)]))
    return {name for name in used if name.split(".")[0] in ROOMS}


def exists(name: str) -> bool:
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:length]))
        except ModuleNotFoundError:
            continue
        for word in words[length:]:
            if not hasattr(found, word):
                return False
            found = getattr(found, word)
        return True
    return False


@pytest.mark.parametrize("page", OWN, ids=relative)
def test_names_in_python_blocks_exist(page: Path) -> None:
    for language, code in FENCE.findall(page.read_text("utf-8")):
        if language == "python":
            missing = [name for name in sorted(named(code)) if not exists(name)]
            assert not missing, f"{relative(page)} uses {missing}"


def test_missing_names_are_found() -> None:
    assert named("import scfg\nfrom training import lora\nscfg.attach(x)\nlora.prepare\n") == {
        "scfg",
        "scfg.attach",
        "training.lora",
        "training.lora.prepare",
    }
    assert exists("scfg.attach")
    assert not exists("scfg.attached")


def test_every_guide_begins_with_a_summary_of_five_points() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        body = page.read_text("utf-8").split("\n", 2)[2]
        summary = re.findall(r"^- ", body.split("\n\n")[0], flags=re.MULTILINE)
        assert len(summary) == 5, f"{page.name} has {len(summary)}"

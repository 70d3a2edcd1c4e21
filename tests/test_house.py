"""Import directions: scfg and adapters import nothing of ours, training only adapters, recipes everything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "scfg": set(),
    "adapters": set(),
    "training": {"adapters"},
    "recipes": {"adapters", "scfg", "training"},
}


def imported_rooms(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names & set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files, f"no Python files under {room}/"
    for file in files:
        strangers = imported_rooms(file.read_text()) - MAY_IMPORT[room] - {room}
        assert not strangers, f"{file.relative_to(ROOT)} imports {sorted(strangers)}"


def test_the_reader_of_imports_sees_every_form() -> None:
    source = "import scfg.regions\ndef f():\n    from training.pocket import judge\nimport os\nfrom . import x\n"
    assert imported_rooms(source) == {"scfg", "training"}


def test_only_settings_import_jsonargparse() -> None:
    users = {
        file.relative_to(ROOT).as_posix()
        for room in MAY_IMPORT
        for file in (ROOT / room).rglob("*.py")
        if "jsonargparse" in file.read_text()
    }
    assert users <= {"training/config.py"}

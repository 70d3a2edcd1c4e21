"""Import directions: which room and folder may import which, no circles, and the page that shows it; names, sizes."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from docs.house import PAGE, ROOMS, circles, graph, imports_in, page, room_of
from docs.sizes import Sizes, sizes

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT: dict[str, set[str]] = {
    "scfg": set(),
    "adapters": set(),
    "training": {"adapters"},
    "recipes": {"adapters", "scfg", "training"},
}


# Inside the rooms. Folder -> the only folders that may import from it, besides itself.
IMPORTED_ONLY_BY = {
    "recipes/common": {"recipes", "benchmarks", "benchmarks/study"},
    "training/kernels": {"training", "benchmarks"},
    "training/pocket/making": {"recipes", "benchmarks", "training/pocket"},
}
# Folder -> the modules of its own room above it that it must not know.
BELOW = {
    "adapters/measuring": ("adapters.ship", "adapters.loading", "adapters.card", "adapters.compose", "adapters.keys"),
    "training/data": (
        "training.loop",
        "training.prepare",
        "training.lora",
        "training.dreambooth",
        "training.controlnet",
    ),
}
# What ships and loads an adapter knows no statistics; these alone put measured gains into a release.
KNOW_MEASURING = {"adapters", "adapters.__main__", "adapters.card", "adapters.ship"}
# A recipe that runs another one, or a stage after it.
CHAINS = {
    "recipes.demo": {"recipes.dreambooth_lora"},
    "recipes.new": {"recipes.dreambooth_lora"},
    "recipes.ship": {"recipes.measure"},
    "recipes.common.after_training": {"recipes.tune", "recipes.measure", "recipes.ship"},
}
# Public names that several files share, each meaning one thing in all of them: name -> the folders of these files.
PROTOCOLS = {
    "Settings": {"recipes"},  # a recipe's settings,
    "run": {"recipes"},  # what it does with them,
    "main": {"recipes", "adapters", "training/pocket/making"},  # and the entry of a command line
    "prepare": {"training"},  # makes the `Method` of a training method
    "fit": {"training/pocket/making"},  # fits one part of the pocket base
    "unwrapped": {"adapters", "scfg"},  # the same helper twice: neither room may import the other
}
COMMANDS = Path("recipes/pocket.py")  # its functions have the names of its subcommands, which wrap pocket/making


def arrows() -> list[tuple[str, str]]:
    return [(module, other) for module, others in graph().items() for other in others]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    ours = [(module, other) for module, other in arrows() if module.split(".")[0] == room]
    assert ours, f"no imports found under {room}/"
    strangers = [pair for pair in ours if pair[1].split(".")[0] not in MAY_IMPORT[room] | {room}]
    assert not strangers


def test_every_folder_with_code_is_a_known_room() -> None:
    assert {room_of(module) for module in graph()} == set(ROOMS)


def test_folders_inside_a_room_keep_their_direction() -> None:
    for module, other in arrows():
        home, there = room_of(module), room_of(other)
        assert home in IMPORTED_ONLY_BY.get(there, {home}) | {there}, f"{module} imports {other}"
        for folder, unknown in BELOW.items():
            if home == folder or home.startswith(f"{folder}/"):
                assert other not in unknown, f"{module} imports {other}"
    pocket = {a for a, b in arrows() if room_of(a) == "training/pocket" and room_of(b) == "training/pocket/making"}
    assert pocket <= {"training.pocket.subjects"}  # which renders them
    assert not [pair for pair in arrows() if room_of(pair[0]) == "training/kernels" != room_of(pair[1])]
    measuring = {a for a, b in arrows() if room_of(a) == "adapters" and room_of(b).startswith("adapters/measuring")}
    assert measuring <= KNOW_MEASURING


def test_recipes_import_one_another_only_where_they_chain_stages() -> None:
    for module, other in arrows():
        if room_of(module) in ("recipes", "recipes/common") and room_of(other) == "recipes" and other != "recipes":
            assert other in CHAINS.get(module, set()), f"{module} imports {other}"


def test_there_are_no_circles() -> None:
    assert circles() == []


def test_the_page_of_rooms_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run `python docs/house.py`"


def test_the_reader_of_imports_sees_every_form() -> None:
    source = "import a.b\ndef f():\n    from c import d\nif TYPE_CHECKING:\n    import e\nfrom . import x\n"
    names = {alias.name for node in imports_in(source) for alias in node.names}
    assert names == {"a.b", "d", "x"}
    assert "training.errors" in graph()["training.config"]
    assert "recipes.measure" in graph()["recipes.common.after_training"]  # inside a function


def test_only_the_command_line_imports_jsonargparse() -> None:
    users = {
        file.relative_to(ROOT).as_posix()
        for room in MAY_IMPORT
        for file in (ROOT / room).rglob("*.py")
        if "jsonargparse" in file.read_text()
    }
    assert users <= {"training/command_line.py"}


def public_names(tree: ast.Module) -> set[str]:
    """The functions and classes at a module's top, also those under a condition."""
    nodes: list[ast.AST] = [*tree.body]
    for node in nodes:
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            nodes += ast.iter_child_nodes(node)
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_is_defined_in_one_file() -> None:
    homes: dict[str, set[Path]] = defaultdict(set)
    for room in MAY_IMPORT:
        for file in (ROOT / room).rglob("*.py"):
            for name in public_names(ast.parse(file.read_text("utf-8"))):
                homes[name].add(file.relative_to(ROOT))
    shared = {name: files for name, files in homes.items() if len(files) > 1}
    for name, folders in PROTOCOLS.items():
        strangers = [file for file in shared.pop(name) if file.parent.as_posix() not in folders]
        assert not strangers, f"{name} is no {name} of the others in {strangers}"
    twice = {name: files for name, files in shared.items() if len(files - {COMMANDS}) > 1}
    assert not twice, "give each its own name, or add a protocol to PROTOCOLS and CONTRIBUTING.md"


def test_public_names_are_found() -> None:
    source = "class A:\n    def no(self): ...\ndef _no(): ...\ntry:\n    def b(): ...\nexcept X:\n    def c(): ..."
    assert public_names(ast.parse(source)) == {"A", "b", "c"}


@pytest.mark.parametrize("room", [*MAY_IMPORT, "benchmarks"])
def test_functions_stay_short_and_say_what_their_arguments_are(room: str) -> None:
    own = sizes()[room]
    assert max(own.lines) <= 60, f"{own.longest} is longer than 60 lines; split it where it reads better"
    assert room == "benchmarks" or own.documented >= 0.9 * own.public


def test_sizes_are_counted() -> None:
    body = "    value = 1\n" * 8
    source = f'''
class Known:
    """Known.

    Args:
        a: one.
    """

    def __init__(self, a: int, b: Any, c): ...

def short(a: Any): ...

def long(a: int, b: int, c: list[Any]):
    """Not counted
    among the lines."""
{body}'''
    own = Sizes()
    own.count(ast.parse(source))
    assert own.lines == [1, 1, 9]
    assert (own.longest, own.arguments, own.bare, own.public, own.documented) == ("long", 7, 3, 2, 1)

"""The rooms of the code and the arrows between them, read from the imports: `python docs/house.py` writes house.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "house.md"
ROOMS = {
    "scfg": "guidance",
    "adapters": "release folders and file formats",
    "adapters/measuring": "sampling, statistics, reports, verification",
    "adapters/measuring/metrics": "metrics and feature networks",
    "training": "settings, methods, the training loop, checkpoints",
    "training/data": "images, crops, cache, batches",
    "training/kernels": "faster layers on a CPU",
    "training/pocket": "the embedded base: world, tokenizer, judge",
    "training/pocket/making": "how the embedded base is made",
    "recipes": "the commands",
    "recipes/common": "what the commands share",
    "benchmarks": "timings",
    "benchmarks/study": "the study of S-CFG's gains",
}
HEAD = """# The rooms of the code

- This page shows which package imports which. `python docs/house.py` makes it, and a test keeps it up to date.
- An arrow points from the importing package to the imported one.
- `scfg` and `adapters` import nothing else of this project, so each can be used alone.
- `training` imports `adapters` for its file formats; `recipes` connects everything.
- Inside a package, no two modules import each other in a circle.

"""


def room_of(module: str) -> str:
    """The folder of a module, as in "training/data"."""
    return "/".join(_files()[module].relative_to(ROOT).parent.parts)


@cache
def graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports anywhere in its file, imports for type checking aside."""
    return {name: set(_imports(name, path)) - {name} for name, path in _files().items()}


@cache
def _files() -> dict[str, Path]:
    tops = {room.split("/")[0] for room in ROOMS}
    paths = (path for top in sorted(tops) for path in sorted((ROOT / top).rglob("*.py")))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def _imports(module: str, path: Path) -> Iterator[str]:
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in imports_in(path.read_text("utf-8")):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{source}.{alias.name}" for alias in node.names]
        yield from (found for name in names if (found := _module_in(name)))


def _module_in(name: str) -> str | None:
    """The longest beginning of a dotted name that is a module of ours."""
    while name and name not in _files():
        name = name.rpartition(".")[0]
    return name or None


def imports_in(source: str) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement, those under `if TYPE_CHECKING:` aside."""
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            waiting.extend(ast.iter_child_nodes(node))


def circles() -> list[list[str]]:
    """Circles of modules that import each other, one for every module where one is found; none: an empty list."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(graph()[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in graph():
        visit(module, [])
    return found


def page() -> str:
    """The whole text of house.md."""
    pairs = {(room_of(module), room_of(other)) for module, others in graph().items() for other in others}
    tops = sorted({(a.split("/")[0], b.split("/")[0]) for a, b in pairs if a.split("/")[0] != b.split("/")[0]})
    lines = [HEAD + "```mermaid", "flowchart LR"]
    lines += [f"    {a} --> {b}" for a, b in tops]
    lines += ["```", "", "| folder | contents | imports from |", "|---|---|---|"]
    for room, contents in ROOMS.items():
        others = [f"`{b}`" for a, b in sorted(pairs) if a == room and b != room]
        lines.append(f"| `{room}` | {contents} | {', '.join(others) or 'nothing of this project'} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")

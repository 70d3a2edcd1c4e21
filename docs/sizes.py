"""Figures of the code by room: `python docs/sizes.py` for the working tree, `python docs/sizes.py COMMIT` for another.

A function's lines are counted without its docstring, so that a longer explanation makes no function longer.
"""

from __future__ import annotations

import ast
import io
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("scfg", "adapters", "training", "recipes", "benchmarks")
MANY = 3
"""From so many arguments on, a public function says what each is."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(kw_only=True)
class Sizes:
    """What is counted in one room."""

    lines: list[int] = field(default_factory=list)
    """Of every function, without its docstring."""
    arguments: int = 0
    bare: int = 0
    """Arguments that are annotated `Any`, or not at all."""
    public: int = 0
    """Public functions with `MANY` arguments or more; a class counts by its `__init__`."""
    documented: int = 0
    """Those with an `Args` section, which ruff keeps complete."""
    longest: str = ""
    """Name of the longest function."""

    def count(self, node: ast.AST, owner: ast.ClassDef | None = None, *, public: bool = True) -> None:
        """Count every function below a node.

        Args:
            node: a module's tree, or a part of it.
            owner: the class that the node is; None: it is none.
            public: whether everything around it has a public name.
        """
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                self._add(child, owner, public=public)
                self.count(child, public=False)
            elif isinstance(child, ast.ClassDef):
                self.count(child, child, public=public and not child.name.startswith("_"))
            else:
                self.count(child, owner, public=public)

    def _add(self, function: Function, owner: ast.ClassDef | None, *, public: bool) -> None:
        count = _lines(function)
        if count > max(self.lines, default=0):
            self.longest = function.name
        self.lines.append(count)
        own = function.args
        arguments = [item for item in [*own.posonlyargs, *own.args, *own.kwonlyargs] if item.arg not in ("self", "cls")]
        self.arguments += len(arguments)
        self.bare += sum(item.annotation is None or ast.unparse(item.annotation) == "Any" for item in arguments)
        made = function.name == "__init__" and owner is not None
        if public and len(arguments) >= MANY and (made or not function.name.startswith("_")):
            self.public += 1
            text = [ast.get_docstring(function) or "", (ast.get_docstring(owner) or "") if made and owner else ""]
            self.documented += any("Args:" in line for line in text)

    def row(self) -> list[str]:
        """Median and 90th percentile of lines, the longest function, and both shares."""
        tenths = statistics.quantiles(self.lines, n=10, method="inclusive")
        return [
            f"{statistics.median(self.lines):.0f}",
            f"{tenths[-1]:.0f}",
            f"{max(self.lines)}",
            f"{self.bare / self.arguments:.1%}",
            f"{self.documented / self.public:.0%}",
        ]


def _lines(function: Function) -> int:
    first = function.body[0]
    said = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or first.lineno) - first.lineno + 1 if said else 0
    return (function.end_lineno or function.lineno) - function.lineno + 1 - docstring


def sizes(commit: str | None = None) -> dict[str, Sizes]:
    """Room -> its figures, of the working tree or of a commit."""
    found = {room: Sizes() for room in ROOMS}
    for room, source in _sources(commit):
        found[room].count(ast.parse(source))
    return found


def _sources(commit: str | None) -> Iterator[tuple[str, str]]:
    if commit is None:
        for room in ROOMS:
            yield from ((room, path.read_text("utf-8")) for path in sorted((ROOT / room).rglob("*.py")))
        return
    packed = subprocess.run(["git", "archive", commit, *ROOMS], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive:
            if member.name.endswith(".py") and (file := archive.extractfile(member)) is not None:
                yield member.name.split("/")[0], file.read().decode()


def main() -> None:
    """Print the table of every commit named, or of the working tree."""
    print("| room | of | median | p90 | longest | bare `Any` | documented |\n|---|---|---|---|---|---|---|")
    tables = {commit: sizes(commit) for commit in sys.argv[1:]} or {"now": sizes()}
    for room in ROOMS:
        for commit, found in tables.items():
            print(f"| `{room}` | {commit} | {' | '.join(found[room].row())} |")


if __name__ == "__main__":
    main()

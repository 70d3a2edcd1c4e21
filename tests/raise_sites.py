"""Where errors that are explained to a user are raised, and which functions a run enters before a dry run ends.

Read off the source. A function counts as entered by another one that names it: by import where the name says which one
it is, and else every method of that name. What is named beyond the return of a dry run counts as late.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("scfg", "adapters", "training", "recipes")
MAKES = ("__init__", "__post_init__", "__enter__", "__len__", "__getitem__")
REQUIRE = ("require", "require_value")
Calls = Mapping[str, Collection[str]]
"""Function -> those that it names; a function is `module.name` or `module.Class.name`."""


class Source:
    """The functions of the four rooms."""

    def __init__(self) -> None:
        self.functions: dict[str, ast.AST] = {}
        self.home: dict[str, str] = {}
        """Function -> its module."""
        self._names: dict[str, dict[str, str]] = defaultdict(dict)
        """Module -> a name at its top or that it imports -> what it stands for, dotted."""
        self._classes: dict[str, list[str]] = defaultdict(list)
        self._methods: dict[str, set[str]] = defaultdict(set)
        self._bases: dict[str, list[ast.expr]] = {}
        trees = {self._module(file): ast.parse(file.read_text("utf-8")) for file in self._files()}
        self._modules = set(trees)
        for module, tree in trees.items():
            self._take(module, module, tree.body)
            package = (
                module if (ROOT / module.replace(".", "/") / "__init__.py").exists() else module.rpartition(".")[0]
            )
            for node in ast.walk(tree):
                self._import(module, package, node)

    @staticmethod
    def _files() -> list[Path]:
        return [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]

    @staticmethod
    def _module(file: Path) -> str:
        return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")

    def _take(self, module: str, place: str, body: list[ast.stmt]) -> None:
        for node in body:
            if place == module and isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name) and node.value is not None:  # a table of functions, for one
                        name = f"{module}.{target.id}"
                        self._names[module][target.id] = name
                        self.functions[name], self.home[name] = node.value, module
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            name = f"{place}.{node.name}"
            if place == module:
                self._names[module][node.name] = name
            if isinstance(node, ast.FunctionDef):
                self.functions[name], self.home[name] = node, module
                if place != module:
                    self._classes[place].append(name)
                    self._methods[node.name].add(name)
            elif place == module:
                self._classes[name], self._bases[name] = [], node.bases
                self._take(module, name, node.body)

    def _import(self, module: str, package: str, node: ast.AST) -> None:
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                self._names[module].setdefault(alias.asname or alias.name, f"{source}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                self._names[module].setdefault(alias.asname or alias.name.split(".")[0], alias.name.split(".")[0])

    def _found(self, dotted: str) -> str | None:
        """A module, class or function of ours, through what modules import from one another; else None."""
        for _ in range(9):
            if dotted in self._modules or dotted in self._classes or dotted in self.functions:
                return dotted
            module, _, name = dotted.rpartition(".")
            dotted = self._names[module].get(name, "") if module in self._modules else ""
        return None

    def _meant(self, module: str, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return self._found(self._names[module].get(node.id, ""))
        if isinstance(node, ast.Attribute) and (owner := self._meant(module, node.value)):
            return self._found(f"{owner}.{node.attr}")
        return None

    def named(self, module: str, nodes: Iterable[ast.AST], *, made: bool = False) -> set[str]:
        """The functions that these pieces of a module may call; `made`: of classes no more than what makes objects."""
        found: set[str] = set()
        for node in (inner for outer in nodes for inner in ast.walk(outer)):
            if not isinstance(node, ast.Name | ast.Attribute) or not isinstance(node.ctx, ast.Load):
                continue
            meant = self._meant(module, node)
            if meant in self.functions:
                found.add(meant or "")
            elif meant in self._classes:
                own = {name: name.rpartition(".")[2] for name in self._methods_of(meant or "")}
                found |= {name for name, last in own.items() if last in MAKES or (last[:2] == "__" and not made)}
            elif isinstance(node, ast.Attribute) and node.attr[:2] != "__" and not self._foreign(module, node):
                found |= self._methods[node.attr]
        return found

    def _methods_of(self, kind: str) -> list[str]:
        """Those of a class and of the classes of ours that it comes from."""
        home = kind.rpartition(".")[0]
        above = [base for node in self._bases.get(kind, ()) if (base := self._meant(home, node)) in self._classes]
        return [*self._classes[kind], *(name for base in above for name in self._methods_of(base or ""))]

    def _foreign(self, module: str, node: ast.AST) -> bool:
        """Whether a chain of attributes begins at a name of the module, such as `torch`, and so at no object."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self._names[module]

    @cached_property
    def calls(self) -> Calls:
        """As a whole run calls them."""
        return {name: self.named(self.home[name], [node]) for name, node in self.functions.items()}

    @cached_property
    def calls_before(self) -> Calls:
        """As a dry run calls them at least: without what comes after its return, and objects are made, not called."""
        return {
            name: self.named(
                self.home[name],
                _before(node.body)[0] if isinstance(node, ast.FunctionDef) and _asks(node) else [node],
                made=True,
            )
            for name, node in self.functions.items()
        }

    def raises(self, errors: Collection[str]) -> dict[str, int]:
        """Function -> how many errors of these classes it makes, and how often it calls one of `REQUIRE`."""
        found: dict[str, int] = defaultdict(int)
        for name, node in self.functions.items():
            for call in (one for one in ast.walk(node) if isinstance(one, ast.Call)):
                made = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
                if made in errors or made in REQUIRE:
                    found[name] += 1
        return dict(found)


def _asks(node: ast.AST) -> bool:
    """Whether it looks at a setting `dry_run`."""
    return any(isinstance(part, ast.Attribute) and part.attr == "dry_run" for part in ast.walk(node))


def _before(body: list[ast.stmt]) -> tuple[list[ast.AST], bool]:
    """What a dry run enters of these statements, and whether it returns among them."""
    kept: list[ast.AST] = []
    for node in body:
        if isinstance(node, ast.If) and _asks(node.test):
            kept.append(node.test)
            if any(isinstance(part, ast.UnaryOp) for part in ast.walk(node.test)):
                continue  # not in a dry run
            inner, _ = _before(node.body)
            kept += inner
            if any(isinstance(part, ast.Return) for part in node.body):
                return kept, True
        elif isinstance(node, ast.With):
            inner, ended = _before(node.body)
            kept += [*node.items, *inner]
            if ended:
                return kept, True
        else:
            kept.append(node)
    return kept, False


def entered(calls: Calls, start: str, *, but: Collection[str] = ()) -> set[str]:
    """The functions that `start` comes to, itself among them, without a way through those of `but`."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        if name not in seen and name not in but:
            seen.add(name)
            todo += calls.get(name, ())
    return seen

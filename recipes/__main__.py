"""The command `scfg-toolkit`: every recipe and the tools for release folders, from any folder.

scfg-toolkit new photos/rex --class dog --base pocket
scfg-toolkit train --config runs/rex/config.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module, metadata

__all__ = ["main"]

PROGRAM = "scfg-toolkit"
RECIPES = {
    "new": "check your photos, write a config for them, and estimate time and memory",
    "train": "train; then tune, measure and ship if the config has these sections (--recipe NAME chooses the recipe)",
    "tune": "find the guidance and the checkpoint with the best measured result",
    "measure": "compare an adapter and guidances: differences with intervals, and verdicts",
    "ship": "make a release folder of what was trained and measured",
    "sample": "draw pictures for prompts",
    "controlled": "draw pictures that follow the edges, lines, depth or classes of your pictures",
    "studio": "a page in the browser that draws CFG and S-CFG side by side",
    "demo": "train, measure and ship a demo subject, in about ten minutes on a CPU",
}
TOOLS = {
    "inspect": "show the contents of an adapter's folder or file",
    "verify": "check a release folder and recompute its figures",
    "convert": "convert an adapter to the keys of another program",
    "merge": "merge adapters into a U-net or into one another",
    "extract": "make a LoRA from the difference of two U-nets",
}
CONFIGS = "list the configs that come with the package"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (recipes end by `SystemExit` where something is wrong)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    command, *rest = words
    if command == "--version":
        print(f"{PROGRAM} {metadata.version(PROGRAM)}")
    elif command in TOOLS:
        return _tool(words)
    elif command == "configs":
        from recipes.common.cli import shipped_configs

        print("\n".join(shipped_configs()))
    elif command in RECIPES:
        return _recipe(command, rest)
    else:
        print(f"error: {PROGRAM} has no command {command!r}; `{PROGRAM} --help` lists them", file=sys.stderr)
        return 2
    return 0


def _help() -> str:
    rows = [f"  {name:11} {what}" for name, what in {**RECIPES, **TOOLS, "configs": CONFIGS}.items()]
    more = [
        f"`{PROGRAM} COMMAND --help` explains its most common settings, and `--help all` explains all of them.",
        f"--config takes a file, or a name that `{PROGRAM} configs` lists.",
        "--processes N runs a recipe in N processes; --launcher FILE takes a config of accelerate instead.",
    ]
    return "\n".join([f"usage: {PROGRAM} COMMAND [--config FILE] [--SETTING VALUE ...]", "", *rows, "", *more])


def _tool(words: list[str]) -> int:
    """Run a tool of `adapters`, with every kind of base that the recipes read."""
    from adapters import __main__ as tools
    from recipes.common import cli
    from recipes.common.base import whole_pipeline
    from training.errors import exit_on_error

    with exit_on_error(cli.explained):
        return tools.main(words, opener=whole_pipeline)


def _recipe(command: str, words: list[str]) -> int:
    """Run a recipe in this process, or in several where that is asked for."""
    from recipes.common import cli
    from training.errors import exit_on_error

    own = argparse.ArgumentParser(prog=f"{PROGRAM} {command}", add_help=False, allow_abbrev=False)
    own.add_argument("--processes", type=int, default=1)
    own.add_argument("--launcher")
    if command == "train":
        own.add_argument("--recipe", choices=cli.TRAININGS)
    options, rest = own.parse_known_args(words)
    with exit_on_error(cli.explained):
        name = cli.training_recipe(rest, options.recipe) if command == "train" else command
        if options.processes > 1 or options.launcher:
            from recipes.common.processes import launch_processes

            return launch_processes(f"recipes.{name}", rest, processes=options.processes, config=options.launcher)
        sys.argv = [f"{PROGRAM} {command}", *rest]
        module = import_module(f"recipes.{name}")
        if hasattr(module, "main"):
            module.main()
            return 0
    cli.launch(module.Settings, module.run)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Makes way for the package `recipes` when a recipe is run as a file, as in `python recipes/new.py`.

Python then looks for modules in the file's own folder, where it finds this one under the package's name, and not in the
root of the checkout. So a recipe runs from a checkout that is not installed, with this checkout's own packages.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
NEEDED = ("yaml", "PIL")  # what is imported before the installation is checked


def _make_way() -> None:
    """Put the root of the checkout in the place of this folder, and import the package under its name."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        activate = HERE.parent / ".venv" / "bin" / "activate"
        remedy = f"run `source {activate}` first" if activate.is_file() else "run `make demo`, or `pip install -e .`"
        print(
            f"error: {', '.join(missing)} cannot be imported by {sys.executable}; the packages of this project are not "
            f"installed there: {remedy}",
            file=sys.stderr,
        )
        raise SystemExit(2)
    sys.path[:] = [str(HERE.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != HERE)]
    del sys.modules["recipes"]
    importlib.import_module("recipes")


if __name__ == "recipes":
    _make_way()

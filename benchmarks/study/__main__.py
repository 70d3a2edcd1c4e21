from __future__ import annotations

from benchmarks.study.study import main
from recipes.common.cli import explained
from training.errors import exit_on_error

if __name__ == "__main__":
    with exit_on_error(explained):
        main()

"""A recipe as its own main, after a line that says how many processes there are: launched by test_two_processes.py."""

from __future__ import annotations

import runpy
import sys

from training.ranks import state

if __name__ == "__main__":
    print(f"process {state().process_index} of {state().num_processes}", flush=True)
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

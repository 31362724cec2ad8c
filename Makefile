# Every target works from a bare clone: it makes .venv with the pinned versions first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test slow check bench format clean

quickstart: $(VENV)/.train
	$(BIN)/deltaw quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.dev
	$(PIP) --editable '.[bench]'
	$(BIN)/python -m benchmarks step --memory
	$(BIN)/python -m benchmarks step --dropout 0.05 --sides bound,ours,peft,peft_cast
	$(BIN)/python -m benchmarks lifecycle
	$(BIN)/python -m benchmarks mix
	$(BIN)/python -m benchmarks loss
	$(BIN)/python scripts/make_docs.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.train

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache

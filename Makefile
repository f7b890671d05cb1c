# Two commands matter: `make demo` and `make test`. Everything else they set up by themselves.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
FASHION_DEB_DIR := /usr/share/datasets/fashion-mnist

.PHONY: install demo test test-all check format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Shoal needs Python 3.11 or 3.12; set PYTHON=/path/to/it" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/shoal-sim demo $(ARGS)

test: install
	$(BIN)/pytest $(ARGS)

test-all: install
	$(BIN)/pytest -m "slow or not slow" $(ARGS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_architecture.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist

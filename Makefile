# Two commands matter: `make demo` and `make test`. Everything else they set up by themselves.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3.12),python3.11)
VENV := .venv
BIN := $(VENV)/bin
# Two files at a time, each in one process: modules share servers that take seconds to start.
PYTEST := $(BIN)/pytest --numprocesses=2 --dist=loadfile
FASHION_MNIST := usr/share/datasets/fashion-mnist

.PHONY: install data demo test test-all check format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Shoal needs Python 3.11 or 3.12; set PYTHON=/path/to/it" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# Debian and Ubuntu package Fashion-MNIST; unpacking it here needs no root. Elsewhere: DATA=folder.
data:
	@if [ ! -d /$(FASHION_MNIST) ] && [ ! -d .data/$(FASHION_MNIST) ] && command -v apt-get >/dev/null; then \
	  mkdir -p .data && cd .data && apt-get download -qq dataset-fashion-mnist >/dev/null 2>&1 \
	    && dpkg-deb -x dataset-fashion-mnist_*.deb . && rm dataset-fashion-mnist_*.deb \
	    || echo "Fashion-MNIST cannot be fetched here; the demo takes scikit-learn's digits"; \
	fi

demo: install data
	$(BIN)/shoal-sim demo $(ARGS)

test: install
	$(PYTEST) $(ARGS)

test-all: install
	$(PYTEST) -m "slow or not slow" $(ARGS)

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

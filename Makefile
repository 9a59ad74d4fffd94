# Each target sets itself up: it needs Python 3.11 or newer, and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: reproduce test torture check notebooks bench clean

reproduce: $(VENV)/.installed  ## the whole experiment, into runs/laptop
	$(BIN)/mingpt reproduce

test: $(VENV)/.installed-dev  ## all tests
	$(BIN)/python -m pytest

torture: $(VENV)/.installed-dev  ## every fault, signal and hostile file of docs/promises.md, in an hour; needs a C compiler
	TORTURE=all $(BIN)/python -m pytest tests/torture

check: $(VENV)/.installed-dev  ## what CI checks: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

notebooks: $(VENV)/.installed-dev  ## run every notebook, PRESET=smoke for a quick look
	$(BIN)/python notebooks/run.py

bench: $(VENV)/.installed  ## the ratios of the README, in turn in one process
	$(INSTALL) --editable '.[hf,grammar]'
	$(BIN)/python benchmarks/bench_core.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.py constraints.txt
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python setup.py constraints.txt
	$(INSTALL) --editable '.[dev,hf,grammar,slurm,widget]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache .hypothesis *.egg-info

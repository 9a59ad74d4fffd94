# Each target sets itself up: it needs Python 3.11 or newer, and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup reproduce test torture check notebooks docs bench clean

setup: $(VENV)/.installed  ## the package and its command, in .venv

reproduce: $(VENV)/.installed  ## the whole experiment, into runs/laptop
	$(BIN)/mingpt reproduce

test: $(VENV)/.installed-dev  ## all tests, the files shared out to the cores
	$(PYTEST)

torture: $(VENV)/.installed-dev  ## every fault, signal and hostile file of docs/promises.md, in up to an hour; needs a C compiler
	TORTURE=all $(BIN)/python -m pytest tests/torture

check: $(VENV)/.installed-dev  ## what CI checks: format, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(PYTEST)

notebooks: $(VENV)/.installed-dev  ## run every notebook, PRESET=smoke for a quick look
	$(BIN)/python notebooks/run.py

docs: $(VENV)/.installed-dev  ## the manual, in docs/build/html; warnings are errors, and nothing is downloaded
	$(BIN)/python docs/update_numbers.py --check
	$(BIN)/python studies/figures.py --check
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --builder html docs docs/build/html
	@echo the manual is in docs/build/html/index.html

bench: $(VENV)/.installed  ## the package against its baselines, in turn in one process
	$(INSTALL) --editable '.[hf,grammar]'
	$(BIN)/python benchmarks/bench_core.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python setup.py constraints.txt
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python setup.py constraints.txt
	$(INSTALL) --editable '.[dev,docs,hf,grammar,slurm,widget]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs docs/build docs/notebooks docs/reference/generated .pytest_cache .ruff_cache .hypothesis *.egg-info

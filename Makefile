# Every target sets up .venv first if it has to; a fresh clone needs only Python, git and make.
PYTHON ?= python3

BIN := .venv/bin
READY := .venv/.minirec-ready
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))

# Tests draw off screen. Notebooks must not inherit this: it would replace their inline figures.
PYTEST := MPLBACKEND=Agg $(BIN)/python -m pytest
NBVAL := $(BIN)/python -m pytest --nbval-lax --nbval-current-env

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lab lint format

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## run the demo
	$(BIN)/minirec demo

test: $(READY) ## run the fast tests, then every notebook
	$(PYTEST)
	$(NBVAL) $(NOTEBOOKS)

test-all: $(READY) ## run all tests, the slow ones too, then every notebook
	$(PYTEST) -m ""
	$(NBVAL) $(NOTEBOOKS)

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab notebooks

lint: $(READY) ## check style and formatting of code and notebooks
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

format: $(READY) ## fix what lint can fix
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Written last, so an interrupted set-up starts again; redone when either file changes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[dev]" -c constraints.txt
	@touch $@

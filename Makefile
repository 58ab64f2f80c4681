# Every target sets up .venv first if it has to; a fresh clone needs only Python, git and make.
PYTHON ?= python3

BIN := .venv/bin
READY := .venv/.minirec-ready
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))

# Tests draw off screen. Notebooks must not inherit this: it would replace their inline figures.
PYTEST := MPLBACKEND=Agg $(BIN)/python -m pytest
NBVAL := $(BIN)/python -m pytest --nbval-lax --nbval-current-env

.DEFAULT_GOAL := help
.PHONY: help demo test test-all tiny lab lint format

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

# Two runs: the first finds what a step has to do, family by family; the second, with deeper rows and a falling
# learning rate, learns to stop. Each goes on where it was stopped. Change THREADS and the losses change a little.
THREADS ?= 2
TRAIN = $(BIN)/minirec train --threads $(THREADS)
tiny: $(READY) ## train the shipped model again, into runs/ (about an hour on two CPU cores)
	$(TRAIN) --out runs/first --seed 0 --steps 8000 --warmup 0.0275 --decay 0 --joining 0.2475 --curriculum 0.4125
	$(TRAIN) --out runs/tiny --start runs/first/checkpoint --seed 1 --steps 6500 --decay 0.75 --joining 0 \
		--curriculum 0 --families automaton words hops words automaton --early 0.35 --random 0.25 --extra 3
	@echo "the checkpoint is in runs/tiny/checkpoint"

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

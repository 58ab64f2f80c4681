# Every target sets up .venv first if it has to; a fresh clone needs only Python, git and make.
PYTHON ?= python3

BIN := .venv/bin
READY := .venv/.minirec-ready
NOTEBOOKS := $(sort $(wildcard notebooks/*.ipynb))

# One thread each (tests/conftest.py), in as many processes as there are cores; a file stays in one process, since a
# notebook's cells share a kernel.  Notebooks come first: they are the longest.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
PYTEST := $(BIN)/python -m pytest $(PARALLEL)
COURSE := --nbval-lax --nbval-current-env $(NOTEBOOKS) tests

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-eval test-nbgrader assignments tiny lab docs drawings badges lint format

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## run the demo
	$(BIN)/minirec demo

test: $(READY) ## run every notebook and the fast tests
	$(PYTEST) $(COURSE)

test-all: $(READY) ## run every notebook and all tests, the slow ones too
	$(PYTEST) -m "" $(COURSE)

.PHONY: coverage types release-check
coverage: $(READY) ## run the fast tests and list the lines they miss; fails below 95 %
	$(PYTEST) --cov --cov-report=term tests

types: $(READY) ## check the package's types
	$(BIN)/python -m mypy

release-check: $(READY) ## build sdist and wheel, and run demo and fast tests with each in a fresh environment
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python tests/release_check.py dist/*

assignments: $(READY) ## write the students' versions of the assignments, into student/
	$(BIN)/python notebooks/assignments/grading.py student student

test-nbgrader: .venv-nbgrader/.minirec-ready ## let nbgrader make and grade the assignments, in an environment of its own
	.venv-nbgrader/bin/python tests/nbgrader_round.py

.venv-nbgrader/.minirec-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-nbgrader
	.venv-nbgrader/bin/python -m pip install -e ".[assignments]" -c constraints.txt
	@touch $@

# lm-eval brings some 600 MB of libraries that nothing else here needs, so it has an environment of its own.
test-eval: .venv-eval/.minirec-ready ## test the model class for lm-eval, in an environment of its own
	.venv-eval/bin/python -m pytest tests/test_lm_eval_adapter.py

.venv-eval/.minirec-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-eval
	.venv-eval/bin/python -m pip install -e ".[eval]" pytest hypothesis -c constraints.txt
	@touch $@

THREADS ?= 2
tiny: $(READY) ## train the shipped model again, into runs/tiny (about two hours on two CPU cores); resumes
	$(BIN)/minirec train --threads $(THREADS) --out runs/tiny
	@echo "the checkpoint is in runs/tiny/checkpoint"

lab: $(READY) ## open the notebooks in JupyterLab
	$(BIN)/python -m jupyterlab notebooks

# An extra of its own: half of what it installs is of no use to a reader of the notebooks.
docs: $(READY) ## build the documentation site and check its links
	$(BIN)/python -m pip install -q -e ".[docs]" -c constraints.txt
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html -c docs . docs/_build
	$(BIN)/python docs/links.py docs/_build
	@echo "open docs/_build/index.html"

drawings: $(READY) ## draw the pictures of README and site again, after a change to minirec/figures/drawings.py
	$(BIN)/python -m minirec.figures.drawings docs/drawings

badges: $(READY) ## write "Open in Colab" into the notebooks: REPO=owner/name on GitHub, REPO=none takes them out
	$(BIN)/python docs/badges.py "$(REPO)" $(NOTEBOOKS)

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

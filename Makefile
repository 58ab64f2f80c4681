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

# What was done, in nine runs: each begins with the weights of the one before, and goes on where it was stopped. The
# last five read every row on its way and taught most; what the others are needed for has not been tried. The first
# six had levels 7 and 8 of the automaton too (minirec/assets/tiny/README.md). Change THREADS and losses change a little.
THREADS ?= 2
TRAIN = $(BIN)/minirec train --threads $(THREADS)
MIXED = --joining 0 --curriculum 0 --families automaton hops automaton words automaton hops
ONCE = --reads 1 --hardest 0
tiny: $(READY) ## train the shipped model again, into runs/ (three hours and more on two CPU cores)
	$(TRAIN) --out runs/1 --seed 0 --steps 8000 --warmup 0.0275 --decay 0 --joining 0.2475 --curriculum 0.4125 $(ONCE)
	$(TRAIN) --out runs/2 --start runs/1/checkpoint --seed 1 --steps 6500 --decay 0.75 --joining 0 --curriculum 0 \
		--families automaton words hops words automaton --early 0.35 --random 0.25 --extra 3 $(ONCE)
	$(TRAIN) --out runs/3 --start runs/2/checkpoint --seed 2 --steps 9000 --until 2000 --decay 0.6 $(MIXED) \
		--early 0.35 --random 0.35 --extra 3 $(ONCE)
	$(TRAIN) --out runs/4 --start runs/3/checkpoint --seed 4 --steps 9000 --until 6500 --decay 0.5 $(MIXED) \
		--early 0.5 --random 0.15 --extra 2.5 --reads 1 --hardest 0.4
	$(TRAIN) --out runs/5 --start runs/4/checkpoint --seed 3 --steps 5000 --until 1000 --decay 0.6 $(MIXED) \
		--learning-rate 0.0018 --early 0.15 --random 0.2 --extra 2.5 --reads 3 --hardest 0.35
	$(TRAIN) --out runs/6 --start runs/5/checkpoint --seed 4 --steps 4500 --until 1750 --decay 0.85 $(MIXED) \
		--learning-rate 0.0018 --early 0.1 --random 0.3 --extra 2.5 --reads 4 --hardest 0.15
	$(TRAIN) --out runs/7 --start runs/6/checkpoint --seed 6 --steps 3300 --until 2500 --decay 0.8 $(MIXED) \
		--learning-rate 0.0017 --early 0.1 --random 0.15 --extra 8 --reads 4 --hardest 0.25
	$(TRAIN) --out runs/8 --start runs/7/checkpoint --seed 7 --steps 1900 --decay 0.8 --joining 0 --curriculum 0 \
		--families automaton hops automaton words automaton automaton \
		--learning-rate 0.0013 --early 0.1 --random 0.15 --extra 9 --reads 4 --hardest 0.45
	$(TRAIN) --out runs/tiny --start runs/8/checkpoint --seed 8 --steps 2400 --decay 0.8 --joining 0 --curriculum 0 \
		--families hops automaton words hops automaton \
		--learning-rate 0.001 --early 0.1 --random 0.2 --extra 14 --reads 4 --hardest 0.3
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

# `make run` and `make test` do all their set-up; a second call skips what is in place.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# The shell reads both from the environment, as they were given: in text of a recipe, `$` and backquotes would be expanded.
override IMAGES := $(value IMAGES)
override RECIPE := $(value RECIPE)
export IMAGES RECIPE

.PHONY: run test lint bench claims clean

run: $(READY)  ## the whole main job: make run [IMAGES=/path/to/folder] [RECIPE=name]
	$(BIN)/pedigree run $${IMAGES:+--images "$$IMAGES"} $${RECIPE:+--recipe "$$RECIPE"}

test: $(READY)
	$(BIN)/pytest --numprocesses=2 --dist=loadgroup

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/pytest -m slow
	$(BIN)/python -m tests.benchmarks

claims: $(READY)  ## the scorecard: 75 minutes of one core, a second call does what is missing
	$(BIN)/python -m tests.benchmarks.claims

clean:  ## stops the services and removes what can be made again; .pedigree (S3, registry, audit log) stays
	[ ! -x $(BIN)/pedigree ] || $(BIN)/pedigree down
	rm -rf .venv .dvc/tmp models reports data/embeddings data/curated .pytest_cache .ruff_cache .import_linter_cache

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Pedigree needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...")'
	@echo "installing the exact versions of requirements.lock into .venv (one to three minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install -qq --disable-pip-version-check --requirement requirements.lock
	$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $(READY)

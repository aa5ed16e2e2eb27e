# Latchkey's commands. `make run` and `make test` need Python 3.11 and make, and nothing else.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python

.PHONY: help run serve console test check bench history fuzz soak proto lock clean format

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.run  ## Start Latchkey with what it needs, the database included
	@exec $(PY) -P -m latchkey_service

console: $(VENV)/.run  ## Start Latchkey and the API Tokens page, to try it (ARGS=ACCOUNT)
	@exec $(PY) -P -m latchkey_console.together $(ARGS)

test: $(VENV)/.dev  ## Run the tests
	@exec $(BIN)/pytest -n 2 --dist loadgroup $(ARGS)

check: $(VENV)/.dev  ## Lint, types, stubs, security
	@exec $(PY) -m tests.checks

bench: $(VENV)/.dev  ## Measure: interleaved rounds, a table and build/bench.json
	@exec $(PY) -m tests.benchmarks $(ARGS)

history: $(VENV)/.dev  ## Verify and delete for a minute while everything breaks (ARGS=--failover)
	@GRPC_VERBOSITY=ERROR exec $(PY) -m tests.history $(ARGS)

fuzz: $(VENV)/.dev  ## Attack the parsers and the server with made-up input (ARGS="--minutes 30 --only policy")
	@exec $(PY) -m tests.fuzz $(ARGS)

MINUTES ?= 30
soak: $(VENV)/.dev  ## Use the service in every way, and look for what grows (MINUTES=30)
	@exec $(PY) -m tests.soak --minutes $(MINUTES) $(ARGS)

proto: $(VENV)/.dev  ## Generate the stubs again
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PY) proto/generate.py

format: $(VENV)/.dev  ## Format the code
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format -q .

clean:  ## Remove what was built; data stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
	  echo "Latchkey needs Python 3.11 or newer as '$(PYTHON)'; say which with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || {
	  echo "Could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	touch $@

# The lock files carry hashes, so what is installed is what was reviewed. The project itself is
# installed without build isolation, or its build tool would come from outside the lock.
$(VENV)/.run: $(VENV)/.python requirements/run.txt pyproject.toml
	@echo "Installing Latchkey's dependencies (once)"
	$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements/run.txt
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.txt
	@echo "Installing the development tools (once)"
	$(PY) -m pip install -q --disable-pip-version-check --require-hashes -r requirements/dev.txt
	touch $@

LOCK = $(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 \
  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate \
  --constraint requirements/pins.in
lock: $(VENV)/.dev  ## Resolve the dependencies anew (ARGS=--upgrade to move them)
	@$(LOCK) --all-extras requirements/build.in -o requirements/run.txt $(ARGS)
	@$(LOCK) --extra service --extra cli --constraint requirements/run.txt -o requirements/service.txt $(ARGS)
	@$(LOCK) --all-extras requirements/build.in --group dev --constraint requirements/run.txt -o requirements/dev.txt $(ARGS)

# Latchkey's commands. They need only Python 3.11 or newer, and make.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.ONESHELL:
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PY := $(BIN)/python

.PHONY: help run console demo test test-slow check bench history fuzz soak sbom proto manifests image lock clean format docs

help:  ## Show these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.run  ## Start the service with an embedded Postgres
	@exec $(PY) -P -m latchkey_service

console: $(VENV)/.run  ## Start the service and the console (ARGS=ACCOUNT)
	@exec $(PY) -P -m latchkey_console.together $(ARGS)

demo: $(VENV)/.run  ## Delete a token while two services use it, and show when each refuses it
	@exec $(PY) examples/demo.py

# Six at once, on two cores: some of them usually wait, for example for the end of a lease. With
# more, tests that measure time can miss their bounds. A part of the tests does not reach the floor,
# so coverage is measured only when all of them run. Three slow ones at once: many measure time.
# Without the variable, the first process saves what it compiles, and the others need not compile it.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(PY) -m pytest --dist loadgroup
test: $(VENV)/.dev  ## Run the tests but the slow ones, and measure coverage, or run some (ARGS="-k delete")
	@$(if $(ARGS),,export PYTEST_PLUGINS=tests.helpers.measured)
	exec $(PYTEST) -n 6 $(or $(ARGS),-m "not slow")

test-slow: $(VENV)/.dev  ## Run the slow tests: the browser, failovers, histories, fuzzing, wheels
	@exec $(PYTEST) -n 3 -m slow $(ARGS)

check: $(VENV)/.dev  ## Check style, types, contract, stubs, lock files and known vulnerabilities
	@exec $(PY) -m tests.checks $(ARGS)

bench: $(VENV)/.dev  ## Measure speed; print a table and write build/bench.json (ARGS=--quick)
	@exec $(PY) -m tests.benchmarks $(ARGS)

history: $(VENV)/.dev  ## Verify and delete for a minute while processes, network and Postgres fail (ARGS=--failover)
	@GRPC_VERBOSITY=ERROR exec $(PY) -m tests.history $(ARGS)

fuzz: $(VENV)/.dev  ## Attack the parsers and the listeners with mutated input (ARGS="--minutes 30 --only policy")
	@exec $(PY) -m tests.fuzz $(ARGS)

MINUTES ?= 30
soak: $(VENV)/.dev  ## Use the service in every way; fail if memory, descriptors or rows keep growing (MINUTES=30)
	@exec $(PY) -m tests.soak --minutes $(MINUTES) $(ARGS)

proto: $(VENV)/.dev  ## Generate the stubs from the .proto files
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PY) proto/generate.py

docs: $(VENV)/.dev  ## Build the documentation site into build/site
	@exec $(PY) -m tests.site

# The same name as in the compose files.
IMAGE ?= latchkey:$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
image:  ## Build the image with docker, podman or buildah, whichever works (IMAGE=NAME BASE=IMAGE)
	@for builder in docker podman buildah; do
	  if command -v $$builder >/dev/null && $$builder info >/dev/null 2>&1; then
	    echo "Building $(IMAGE) with $$builder"
	    exec $$builder build --build-arg LATCHKEY_BUILD="$$(git rev-parse --short HEAD 2>/dev/null || true)" \
	      $(if $(BASE),--build-arg BASE=$(BASE)) $(ARGS) --tag $(IMAGE) .
	  fi
	done
	echo "No image builder works here: install docker, podman or buildah, or start docker's daemon." >&2
	exit 1

manifests:  ## Render the Kubernetes manifests from the Helm chart (needs helm)
	@mkdir -p build
	{ echo "# Rendered from deploy/helm/latchkey by make manifests; docs/deploy.md describes it."
	  helm template latchkey deploy/helm/latchkey --kube-version 1.30.0; } > build/manifests.yaml
	mv build/manifests.yaml deploy/kubernetes/latchkey.yaml

format: $(VENV)/.dev  ## Format the code and apply safe fixes
	@$(BIN)/ruff check --fix-only -q .
	@$(BIN)/ruff format -q .

clean:  ## Remove .venv, build output and caches; keep the data directory
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
	  echo "Latchkey needs Python 3.11 or newer, and '$(PYTHON)' is older or missing. Choose another: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || {
	  echo "Could not create a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	touch $@

# The lock files contain hashes, so pip installs exactly the reviewed files. The distributions are
# installed without build isolation, because an isolated build would ignore the lock file.
DISTRIBUTIONS := proto clients/python clients/cli service
PROJECTS := $(addsuffix /pyproject.toml,$(DISTRIBUTIONS))
OWN = --no-deps --no-build-isolation $(DISTRIBUTIONS:%=-e ./%)

# Python compiles what it imports. To compile everything would take a quarter of the time.
PIP_INSTALL = $(PY) -m pip install -q --disable-pip-version-check --no-compile

$(VENV)/.run: $(VENV)/.python requirements/run.txt pyproject.toml hatch_build.py $(PROJECTS)
	@echo "Installing Latchkey's dependencies (once)"
	$(PIP_INSTALL) --require-hashes -r requirements/run.txt
	$(PIP_INSTALL) $(OWN)
	touch $@

# uv installs the tools, and all of the above, in a tenth of pip's time. It does not read pip's
# configuration, which may name another index, so pip installs them where uv cannot.
UV_INSTALL = env UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=1 $(BIN)/uv pip install -q --python $(PY)

$(VENV)/.dev: $(VENV)/.python requirements/run.txt requirements/dev.txt pyproject.toml hatch_build.py $(PROJECTS)
	@echo "Installing Latchkey's dependencies and the development tools (once)"
	sed -n '/^uv==/,/[^\\]$$/p' requirements/dev.txt > $(VENV)/uv.txt
	$(PIP_INSTALL) --require-hashes -r $(VENV)/uv.txt
	for install in "$(UV_INSTALL)" "$(PIP_INSTALL)"; do
	  if $$install --require-hashes -r requirements/dev.txt && $$install $(OWN); then break; fi
	  [[ $$install != "$(PIP_INSTALL)" ]] || exit 1
	  echo "uv could not install them, so pip does"
	done
	touch $(VENV)/.run $@

sbom: $(VENV)/.dev  ## Write a bill of materials in CycloneDX's format to build/latchkey.cdx.json
	@exec $(PY) -m tests.checks.sbom

# We do not use uv.lock, because it contains the index and the address of every file.
LOCK = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --python $(PY) --no-build-isolation \
  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --no-annotate \
  --no-emit-package latchkey-proto --no-emit-package latchkey-client --constraint requirements/pins.in
lock: $(VENV)/.dev  ## Resolve the dependencies again (ARGS=--upgrade to upgrade them)
	@$(LOCK) $(PROJECTS) --extra embedded --extra console --extra tracing requirements/build.in -o requirements/run.txt $(ARGS)
	@$(LOCK) $(PROJECTS) --extra tracing --constraint requirements/run.txt -o requirements/service.txt $(ARGS)
	@$(LOCK) $(PROJECTS) --all-extras requirements/build.in --group pyproject.toml:dev \
	  --constraint requirements/run.txt -o requirements/dev.txt $(ARGS)

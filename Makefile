# `make scan` and `make test` set up .venv on their first call; later calls start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
OUT ?= runs/tiny-digits
# a worker for each processor, which goes on with what another has left
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal

.PHONY: scan test test-all check

scan: $(VENV)/.installed
	$(BIN)/blockprune scan --out $(OUT) $(ARGS)

test: check
	$(PYTEST) $(ARGS)

test-all: check
	$(PYTEST) -m '' $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "blockprune needs Python 3.11 or newer: '$(PYTHON)' is missing or older; say make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing blockprune and its dependencies into $(VENV) (once; torch is a large download)"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the development tools into $(VENV) (once)"
	@$(PIP) --editable '.[dev]'
	@touch $@

# The two commands: `make quickstart` and `make test`. Both set up .venv on their own; all they need is
# Python 3.11 or newer with pip and venv. PYTHON=python3.12 VENV=.venv312 picks another.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: quickstart test test-slow table lint clean

quickstart: $(VENV)/.plots
	@PATH="$(abspath $(BIN)):$$PATH" sh examples/quickstart.sh

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# Runs the tests that fill README's table of families, and writes it.
table: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --table

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.plots $(VENV)/.dev: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Garrulax needs Python 3.11 or newer, not " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing Garrulax and what it needs into $(VENV) (a few minutes the first time)"
	@$(PIP) install --editable ".[$(subst .,,$(notdir $@))]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

# Everything that is done with a checkout.  It needs make, Python and, the first time, a
# network: the tools, PostgreSQL among them, are Python packages that go into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test lint types fuzz bench bench-latency clean

help: ## Tell what can be made (this)
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/    \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

venv: $(INSTALLED) ## Install walproto and its tools into .venv

demo: $(INSTALLED) ## See a real standby follow a real primary through walproto
	@$(BIN)/python -m tests.demo

test: lint types ## Run all tests and checks
	$(BIN)/python -m pytest

lint: $(INSTALLED) ## Check the style
	$(BIN)/ruff check .

types: $(INSTALLED) ## Check the types
	$(BIN)/mypy

SECONDS := 60
fuzz: $(INSTALLED) ## Fuzz every decoder and the whole session, each for 60 s (SECONDS=60)
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

bench: $(INSTALLED) ## Measure it beside PostgreSQL's own walsender, which takes ten minutes
	@$(BIN)/python -c 'import matplotlib' 2>/dev/null || \
	    $(BIN)/python -m pip install -qq -e '.[bench]'
	@$(BIN)/python -m benchmarks

bench-latency: $(INSTALLED) ## Measure how long a commit takes through a relay
	@$(BIN)/python -m benchmarks.commit_latency

clean: ## Remove all that was made, .venv too
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	rm -rf _trial_temp* twisted/plugins/dropin.cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# Made anew when what to install changes.
$(INSTALLED): $(wildcard setup.cfg pyproject.toml)
	@command -v $(PYTHON) >/dev/null || { \
	    echo "There is no $(PYTHON) here; name one with: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "walproto needs Python 3.11 or newer, and $(PYTHON) is" \
	        "$$($(PYTHON) --version 2>&1); name another one with: make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { \
	    echo "$(PYTHON) cannot make a virtual environment;" \
	        "on Debian that takes the package python3-venv." >&2; exit 1; }
	@echo "Installing walproto and its tools into $(VENV) ..."
	@$(BIN)/python -m pip install -qq -e '.[dev]'
	@touch $@

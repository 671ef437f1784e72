# Everything from a fresh clone, with python3 (3.11 or newer), make and pip.
#   make demo    sets up and shows what routing gets with real models (QUESTIONS=file.jsonl for others than its own)
#   make test    every test, those on the real models too
# VENV=folder uses another virtual environment, PYTHON=python3.12 makes it with another Python.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Retries and seconds of a registry that is slow for a while.
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check --retries 10 --timeout 60 -c constraints.txt

# One stamp a set of extras: the demo does not wait for the test tools.
LOCAL := $(VENV)/.viaticum-local
DEV := $(VENV)/.viaticum-dev
BROWSER := $(VENV)/.viaticum-browser
POOL := $(VENV)/.viaticum-pool

.PHONY: help demo test coverage prove lint format bench docs dist clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,4s/^# \{0,1\}//p' Makefile
	@echo "also: coverage, prove, lint, format, bench, docs, dist, clean"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "viaticum needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(LOCAL): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing packages with pip"; start=$$(date +%s); $(INSTALL) -e '.[local,sandbox,reports]' && \
	  echo "packages: installed after $$(($$(date +%s) - start)) s"
	@touch $@

# dev holds local, sandbox and reports.
$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[dev]'
	@touch $(LOCAL) $@

# For the tests of reports: a Chromium of this machine, or one that is fetched into the user's cache.
$(BROWSER): tests/support/chromium.py | $(DEV)
	$(BIN)/python tests/support/chromium.py
	@touch $@

# For the tests of the ledger in Postgres: a PgBouncer of this machine, or Debian's in the user's cache.
$(POOL): tests/support/pgbouncer.py | $(DEV)
	$(BIN)/python tests/support/pgbouncer.py
	@touch $@

demo: $(LOCAL)
	$(BIN)/python examples/demo.py --pull $(QUESTIONS)

# Two workers, one thread each: more threads would wait for each other. Exit 5 of pytest: no test was chosen.
test: $(DEV) $(BROWSER) $(POOL)
	$(BIN)/viaticum models pull
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not real"
	$(BIN)/pytest -q -m real || test $$? -eq 5

# Lines that no test reaches, without the real models; the page is build/coverage/index.html.
coverage: $(DEV) $(BROWSER) $(POOL)
	$(BIN)/viaticum models pull
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m "not real" --cov --cov-report=term:skip-covered --cov-report=html:build/coverage

# The ledger's races, kills and random sequences in full: 200,000 attempts, 1,000 kills, 10,000 examples a store. Hours.
prove: $(DEV)
	VIATICUM_PROVE=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -s -n 0 tests/budgets/test_ledger_races.py tests/budgets/test_ledger_kills.py \
	  tests/budgets/test_ledger_properties.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p viaticum

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# decode.py and pareto.py ask questions of a file: make bench QUESTIONS=file.jsonl. Those that read what a profile wrote are
# run by hand.
bench: $(LOCAL)
	$(BIN)/viaticum models pull
	@set -e; for file in $(filter-out %/decode.py %/pareto.py %/parity.py %/routers.py %/router_add.py %/routed.py %/tune.py,$(sort $(wildcard benchmarks/[a-z]*.py))) \
	    $(if $(QUESTIONS),"benchmarks/decode.py $(QUESTIONS)" "benchmarks/pareto.py $(QUESTIONS)"); do \
	  echo "== $$file"; $(BIN)/python $$file; done

# docs/reference/cli.md is made from the code; the site in build/site fails on a broken link.
docs: $(DEV)
	$(BIN)/typer viaticum.cli utils docs --name viaticum --output docs/reference/cli.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -f docs/site/mkdocs.yml

# Wheel and sdist in dist/, each tried in a clean virtual environment: what the release uploads.
dist:
	PYTHON=$(PYTHON) .ci/dist dist

# Only what make made here: a VENV given from outside stays.
clean:
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

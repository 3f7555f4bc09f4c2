# `make run` and `make test` do all set-up themselves; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
FOR_TESTS := $(VENV)/.installed-for-tests
# Of what is installed Python compiles what it imports, once if it may keep that. To compile all takes longer than to
# install it.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup run test test-gpu test-cluster attack test-consumers lint format clean

setup: $(FOR_TESTS)

$(INSTALLED): requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(FOR_TESTS): $(INSTALLED) requirements-dev.txt
	$(PIP) --requirement requirements-dev.txt
	touch $@

run: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores all

# A process a core; the tests of one file stay together, since they share what is expensive to make.
test: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The library on the first GPU, in under 10 minutes; skipped where there is none. With the Python that is named, in which
# torch, transformers, peft, safetensors, pandas, pyarrow and pytest are all that is needed: nothing is installed.
test-gpu:
	PYTHONPATH="$(CURDIR)/lib" $(PYTHON) -m pytest tests/gpu

# The workflow on a Slurm: on one that answers, or on one that is started for the tests on this machine (root, Debian's packages).
test-cluster: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" MPL_CLUSTER=1 python -m pytest -n 0 tests/cluster

# Hostile files, kills, full disks and rival writers, in about a quarter of an hour on 2 cores. See docs/attacks.md.
attack: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" python tests/attack --output docs/attacks.md

# Exported stages in llama.cpp, vLLM and mergekit: needs the network and about 7 GB for their environments.
test-consumers: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" python tests/consumers/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile rules
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --lint

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/snakefmt Snakefile rules

clean:
	rm -rf $(VENV) $(VENV)-consumers .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache lib/*.egg-info

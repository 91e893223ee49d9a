# Every target sets itself up: on a fresh machine only Python 3.11 or newer (with venv) and make are needed.
#   PYTHON=python3.12 make test    another interpreter
#   JOBS=4 make test               more test processes

SHELL := /bin/bash
PYTHON ?= $(or $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c \
	'import sys; sys.version_info >= (3, 11) and print("$(p)")' 2>/dev/null))),python3)
JOBS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

.PHONY: demo check test test-all test-gpu lint typecheck bench clean help

help:
	@echo "make demo      install, train a small model over 2 ranks on 2 cores, sample from it (a few minutes)"
	@echo "make check     lint and the core's tests, for the inner loop (under two minutes on 2 cores)"
	@echo "make test      lint, then the tests that need no GPU (under 20 minutes on 2 cores)"
	@echo "make test-all  the slow tests too"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make lint      ruff (rules and format) and mypy"
	@echo "make bench     time the attention and its baselines on this machine"

demo: .venv/.installed
	$(BIN)/race-dist train configs/demo.toml --nproc 2 --overwrite

# The core: operator, layers, models, one process of parallel, configurations, the package's layers, bad inputs.
CORE := tests/ops tests/nn tests/models tests/parallel tests/inputs tests/kernels/test_plan.py tests/test_attention.py \
	tests/test_architecture.py tests/test_package.py tests/test_vocabulary.py tests/training/test_train_config.py

check: lint
	$(PYTEST) -m "not slow and not gpu" -k "not wheel" $(CORE)

test: lint .venv/.installed-cluster .venv/.installed-browser
	$(PYTEST) -m "not slow and not gpu" --durations 20

test-all: lint .venv/.installed-cluster .venv/.installed-browser
	$(PYTEST) -m "not gpu"

test-gpu: .venv/.installed-dev
	$(BIN)/pytest -m gpu

lint: .venv/.installed-dev
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check --quiet .
	@$(MAKE) --no-print-directory typecheck

# mypy sees the package as it is installed: with kernels/ and launch/ inside.
TYPED := build/typing/race_dist

typecheck:
	@mkdir -p $(TYPED) && find $(TYPED) -type l -delete
	@ln -s $(CURDIR)/race_dist/* $(CURDIR)/kernels $(CURDIR)/launch $(TYPED)/
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/race-dist bench attention

# What the package needs to run, then what its development needs on top.
.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing race-dist into .venv (the first time downloads PyTorch)"
	$(PIP) --editable .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) --editable '.[triton,megatron,deepspeed,transformers,slurm,nvml,test]'
	@touch $@

# A Slurm and network tools for tests/cluster, from apt where that is possible.
.venv/.installed-cluster: tests/cluster/install.sh | .venv/bin/python
	@tests/cluster/install.sh
	@touch $@

# A browser, in which a test looks at the report page.
.venv/.installed-browser: tests/training/install.sh | .venv/bin/python
	@tests/training/install.sh
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit(1)' 2>/dev/null || { \
		echo "race-dist needs Python 3.11 or newer; '$(PYTHON)' is not: try PYTHON=/path/to/python3.11 make ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments (no ensurepip): on Debian and Ubuntu: apt install python3-venv" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

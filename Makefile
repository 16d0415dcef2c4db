# The same commands people and CI use. Set-up makes .venv with a CPU build of torch; a GPU machine installs its own torch first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# what benchmarks run on: a GPU machine's own Python has its own torch, `make bench-train RUN=python3`
RUN ?= $(BIN)/python
# processes that share the tests; each grows to about 2 GB
WORKERS ?= 2

.PHONY: demo test test-slow test-faults test-lowest test-optimizers lint format docs bench-ops bench-train bench-parallel targets clean setup

setup: $(STAMP)

$(STAMP): pyproject.toml constraints/cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q --constraint constraints/cpu.txt torch
	$(BIN)/python -m pip install -q --constraint constraints/cpu.txt --editable '.[train,test,lint]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m deltatune.demo

# a file goes whole to a process, so that what its tests share is made once
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

# whole runs on several ranks, and code generated for more layers
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(PARALLEL)

# every fault at every moment, in one process: most of an hour
test-faults: $(STAMP)
	$(BIN)/python -m pytest tests/faults -m 'faults or not faults' --numprocesses 0

# what goes with the libraries of state and weights in 8 and 4 bits, which run on a CPU too. They are not in the tests'
# own environment: PEFT imports both where they are there, some seconds in every process
OPTIMIZERS := $(VENV)/optimizers
test-optimizers: $(STAMP)
	$(BIN)/python -m pip install -q --constraint constraints/cpu.txt --no-deps --upgrade --target $(OPTIMIZERS) bitsandbytes torchao
	PYTHONPATH=$(OPTIMIZERS) $(BIN)/python -m pytest tests/training/test_optimizers.py tests/compile/test_memory.py \
	  tests/training/test_preflight.py tests/ops/test_dequantize_bitsandbytes.py \
	  tests/quantization/test_loaded_by_bitsandbytes.py

# the same tests with the oldest versions that the package allows, but for torch, whose oldest has no CPU build on PyPI
test-lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q --constraint constraints/lowest.txt torch
	.venv-lowest/bin/python -m pip install -q --constraint constraints/lowest.txt --editable '.[train,test]'
	.venv-lowest/bin/python -m pytest -m 'not faults' $(PARALLEL)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m tools.config_reference > docs/config.md
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m tools.parallelism_page

# records go to benchmarks/records; ARGS='--model qwen3.5-9b --frontier' and so on
bench-ops:
	$(RUN) -m benchmarks.ops $(ARGS)

bench-train:
	$(RUN) -m benchmarks.train $(ARGS)

bench-parallel:
	$(RUN) -m benchmarks.parallel $(ARGS)

targets:
	$(RUN) -m benchmarks.targets

clean:
	rm -rf $(VENV) .venv-lowest build dist .mypy_cache .pytest_cache .ruff_cache

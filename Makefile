# One command each: `make demo` sets everything up and runs the main job, `make test` sets everything up and checks it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done

.PHONY: demo test lint types suite setup native bench gpu mutations clean

demo: setup
	$(BIN)/fishertune demo --resume

test: lint types suite

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# One thread and one worker a core: the tests are many short calls, which threads only slow down.
suite: setup
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto -m "not slow and not gpu"

setup: $(SETUP)

# torch first and pinned: whatever asks for plain "torch" later is then satisfied. With an NVIDIA GPU the same pin takes
# the CUDA build; TORCH_INDEX names another wheel index, e.g. the CPU one of the PyTorch project.
$(SETUP): pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

# Rebuilds the native library in place after a change in csrc/; FISHERTUNE_CUDA=ON, OFF or AUTO decides on its CUDA part.
native: setup
	$(BIN)/python setup.py build_native

bench: setup
	$(BIN)/python -m pytest -s $(wildcard benchmarks/bench_*.py)

gpu: setup
	$(BIN)/python benchmarks/gpu_acceptance.py

# Breaks a copy of the kernels in every listed way and expects a test to turn red each time (the better part of an hour).
mutations: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/kernels/mutations.py --write

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/fishertune_kernels/lib

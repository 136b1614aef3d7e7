# make env    a virtual environment with pinned versions
# make demo   the whole way on two CPU cores, in demo_output/
# make test   all tests
# make lint   ruff

PYTHON ?= python3
VENV ?= .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: env demo test lint

env: $(READY)

# PyTorch comes first and alone, so that what else is installed finds the build of this machine (CPU or CUDA) in place.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: env
	PATH="$(BIN):$$PATH" bash examples/demo.sh

test: env
	PATH="$(BIN):$$PATH" python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Two commands on a fresh machine: `make train` and `make test`. Both set up .venv first.
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: train train3 test test-fast lint bench clean

train: $(VENV)/.train
	$(BIN)/advgame train configs/tiny.yaml

train3: $(VENV)/.train
	$(BIN)/advgame train configs/tiny.yaml --seeds 3

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m bench kernels

SETUP := pyproject.toml setup.py constraints.txt scripts/setup.sh $(wildcard csrc/*)

$(VENV)/.train: $(SETUP)
	scripts/setup.sh $(VENV) train
	@touch $@

$(VENV)/.dev: $(SETUP)
	scripts/setup.sh $(VENV) dev
	@touch $@ $(VENV)/.train

clean:
	rm -rf build dist *.egg-info kernels/*.egg-info kernels/advgame_kernels/*.so

# Two commands on a fresh machine: `make train` and `make test`. Both set up .venv first.
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: train train3 test test-fast test-vllm lint docs bench bench-gpu clean

train: $(VENV)/.train
	$(BIN)/advgame train configs/tiny.yaml

train3: $(VENV)/.train
	$(BIN)/advgame train configs/tiny.yaml --seeds 3

test: $(VENV)/.dev lint
	$(BIN)/python -m pytest

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow"

# The tests that need real vLLM, on the CPU: 3.4 GB more, about 10 minutes.
test-vllm: $(VENV)/.vllm
	$(BIN)/python -m pytest tests/publish tests/rollout tests/run/test_vllm_run.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python scripts/settings-reference.py
	$(BIN)/mkdocs build -q -d build/site

bench: $(VENV)/.dev
	$(BIN)/python -m bench kernels

# On a machine whose own Python has torch with CUDA and triton: correctness on the card, then every kernel benchmark.
bench-gpu:
	PYTHONPATH=.:kernels python3 -m bench kernels --device cuda --check --out bench/results
	PYTHONPATH=.:kernels python3 -m bench ema --device cuda --out
	PYTHONPATH=.:kernels python3 -m bench publish --device cuda --out

SETUP := pyproject.toml setup.py constraints.txt scripts/setup.sh $(wildcard csrc/*)

$(VENV)/.train: $(SETUP)
	scripts/setup.sh $(VENV) train
	@touch $@

$(VENV)/.dev: $(SETUP)
	scripts/setup.sh $(VENV) dev
	@touch $@ $(VENV)/.train

$(VENV)/.vllm: $(VENV)/.dev scripts/setup-vllm.sh
	scripts/setup-vllm.sh $(VENV)
	@touch $@

clean:
	rm -rf build dist *.egg-info kernels/*.egg-info kernels/advgame_kernels/*.so

# Two commands on a fresh machine: `make train` and `make test`. Both set up .venv first.
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# Tests run in as many processes as there are cores, four at most: each may hold a model or an engine.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$n || echo 4)
SPREAD := -n $(WORKERS)

.PHONY: train train3 test test-fast lint docs bench soak bench-gpu gpu-site clean

train: $(VENV)/.train
	$(BIN)/advgame train configs/tiny.yaml

train3: $(VENV)/.train
	$(BIN)/advgame train configs/tiny.yaml --seeds 3

# Everything; what tests drive besides (vLLM's CPU build, DeepSpeed, Ray, lm-eval, official scorers: 5 GB) comes first.
test: $(VENV)/.test lint
	$(BIN)/python -m pytest $(SPREAD)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" $(SPREAD)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.dev
	$(BIN)/python scripts/settings-reference.py
	$(BIN)/mkdocs build -q -d build/site

bench: $(VENV)/.dev
	$(BIN)/python -m bench kernels

# A run of 1000 steps that is killed about every 50, and one that is not; half an hour on two cores.
soak: $(VENV)/.dev
	$(BIN)/python -m bench soak --twin

# On a GPU, with python3 or $PYTHON: correctness on the card, then every benchmark for one.
bench-gpu:
	scripts/bench-gpu.sh

# For a GPU machine without a package index, whose Python GPU_PYTHON has torch, triton and transformers: what else we need
# there, and the peers that are measured beside us. It comes along as build/gpu-site.
GPU_PYTHON ?= 3.12
# QuACK is not among them: its compiler alone is 92 MB packed.
GPU_PEERS := liger-kernel cut-cross-entropy "trl==1.16.*" datasets dill multiprocess
gpu-site: $(VENV)/.train
	rm -rf build/gpu-site
	$(BIN)/python -m pip --disable-pip-version-check install -q --only-binary=:all: \
		--python-version $(GPU_PYTHON) --target build/gpu-site pydantic
	$(BIN)/python -m pip --disable-pip-version-check install -q --only-binary=:all: --no-deps \
		--python-version $(GPU_PYTHON) --upgrade --target build/gpu-site $(GPU_PEERS)

SETUP := pyproject.toml setup.py constraints.txt scripts/setup.sh $(wildcard csrc/* csrc/host/*)

$(VENV)/.train: $(SETUP)
	scripts/setup.sh $(VENV) train
	@touch $@

$(VENV)/.dev: $(SETUP)
	scripts/setup.sh $(VENV) dev
	@touch $@ $(VENV)/.train

$(VENV)/.test: $(VENV)/.dev scripts/setup-test.sh
	scripts/setup-test.sh $(VENV)
	@touch $@

clean:
	rm -rf build dist *.egg-info kernels/*.egg-info kernels/advgame_kernels/*.so advgame/publish/*.so

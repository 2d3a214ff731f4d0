# make quickstart | test | test-slow | check | format | bench | mutants | soak | figures: each sets up .venv by itself.
# On a machine with a CUDA driver: make quickstart TORCH_INDEX_URL=https://download.pytorch.org/whl/cu130

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX_URL ?=
TORCH := torch==2.13.0
CPU_INDEX_URL := https://download.pytorch.org/whl/cpu
PIP := .venv/bin/python -m pip --disable-pip-version-check
BIN := .venv/bin
TORCH_STAMP := .venv/torch$(subst :,_,$(subst /,_,$(TORCH_INDEX_URL))).installed
RUN_STAMP := $(TORCH_STAMP:.installed=-run.installed)

.PHONY: quickstart test test-slow check format bench mutants soak figures clean

quickstart: $(RUN_STAMP)
	$(BIN)/dlm run quickstart

# Three processes for two cores: much of a test is waiting.  The tests start hundreds of interpreters, which would each
# compile the sources again where no compiled ones may be kept.
test: .venv/dev.installed
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -n 3

test-slow: .venv/dev.installed
	$(BIN)/python -m pytest -q -m "slow and not gpu and not network"

check: .venv/dev.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: .venv/dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/dev.installed
	$(BIN)/python -m benchmarks.objective
	$(BIN)/python -m benchmarks.model_step
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.tokenization
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.sampling
	$(BIN)/python -m benchmarks.orchestration --install

mutants: .venv/dev.installed
	$(BIN)/python -m tests.support.mutants

soak: .venv/dev.installed
	$(BIN)/python -m tests.support.soak

figures: .venv/dev.installed
	$(BIN)/python -m benchmarks.figures
	$(BIN)/python -m benchmarks.figures_packing
	$(BIN)/python -m benchmarks.figures_quality
	$(BIN)/python -m benchmarks.figures_adaptation
	$(BIN)/python -m benchmarks.figures_pipeline

# torch comes first and alone: without an NVIDIA driver the build without CUDA, from wherever pip is set up to
# look, then from PyTorch's own index.
$(TORCH_STAMP): constraints.txt
	@echo "installing into .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) uninstall -q -y torch 2>/dev/null || true
	@rm -f .venv/*.installed
	@if [ -n "$(TORCH_INDEX_URL)" ]; then $(PIP) install -q $(TORCH) --index-url $(TORCH_INDEX_URL); \
	elif command -v nvidia-smi >/dev/null 2>&1 || [ "$$(uname -s)" != Linux ]; then $(PIP) install -q $(TORCH); \
	else $(PIP) install -q $(TORCH)+cpu 2>/dev/null || $(PIP) install -q $(TORCH) --index-url $(CPU_INDEX_URL); fi
	@touch $@

$(RUN_STAMP): $(TORCH_STAMP) pyproject.toml constraints.txt
	@$(PIP) install -q -c constraints.txt -e '.[train,cluster,track,hf]'
	@touch $@

.venv/dev.installed: $(RUN_STAMP)
	@$(PIP) install -q -c constraints.txt -e '.[train,cluster,track,hub,hf,fast,dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info

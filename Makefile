# `make help` lists the targets.
# VENV, PYTHON, DEVICE (auto, cpu, cuda), TORCH_INDEX and ARGS can be given: make demo DEVICE=cpu ARGS='seed=2'

VENV   ?= .venv
DEVICE ?= auto
# The first Python that starts and has a version that rft supports (a pyenv shim may exist and not start).
PYTHON ?= $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
BIN := $(abspath $(VENV))/bin
# Threads of one process. Ray, vLLM and torch each start as many as there are cores where this is not said.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export TORCH_INDEX
# Where this is set, every process of a run compiles torch, vLLM and Ray anew: 20 s to start instead of 10.
unexport PYTHONDONTWRITEBYTECODE
# Test processes side by side. Each is single-threaded; a file's tests stay together, they share actors and engines.
# Not sorted by number of tests: the few and long runs of tests/integration would come last, on one process.
WORKERS ?= 2
SHARED := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

SETUP = @test -n "$(PYTHON)" || { echo "[setup] FAILED: no Python 3.11 or 3.12 found. Remedy: install one" \
	"(Debian, Ubuntu: apt-get install python3.11 python3.11-venv) or name it: make $@ PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	"$(PYTHON)" scripts/setup_env.py "$(VENV)" --device "$(DEVICE)"
TEST_EXTRAS = dev,deepspeed,gguf,quant --models smollm2

.DEFAULT_GOAL := help
.PHONY: help demo demo-llm test test-numerics test-slow test-gpu lint format docs bench bench-gpu clean

help: ## list these commands
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: ## install what is needed, then train the embedded arithmetic model (about 10 minutes on 2 cores)
	$(SETUP)
	@echo "[demo] rft train examples/arithmetic.yaml $(ARGS)"
	@$(BIN)/rft train examples/arithmetic.yaml $(ARGS) || { code=$$?; \
		echo "[demo] FAILED: rft train ended with exit code $$code. Remedy: the message above; 75 means stopped on request:" \
		"run make demo again, it goes on from its checkpoint." >&2; exit $$code; }

demo-llm: ## the same with a pretrained model, SmolLM2-135M-Instruct (about 25 minutes on 2 cores with bfloat16)
	$(SETUP) --extras gguf --models smollm2
	@$(BIN)/python scripts/demo_llm.py $(ARGS) || { code=$$?; \
		echo "[demo-llm] FAILED: rft train ended with exit code $$code. Remedy: the message above; 75 means stopped on" \
		"request: run make demo-llm again, it goes on from its checkpoint." >&2; exit $$code; }

test: ## install what is needed, with the test extras, then run the test suite (but for the slow tests)
	$(SETUP) --extras $(TEST_EXTRAS)
	@echo "[test] pytest $(SHARED) $(ARGS)"
	@$(BIN)/pytest $(SHARED) $(ARGS) || { code=$$?; \
		echo "[test] FAILED with exit code $$code. Remedy: the failures above; one again: $(VENV)/bin/pytest FILE::TEST -x" >&2; exit $$code; }

test-numerics: ## the tests that compare arithmetic; ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY emulate weaker processors
	$(SETUP) --extras $(TEST_EXTRAS)
	@$(BIN)/pytest $(SHARED) -m "numerics and not gpu and not slow" $(ARGS) || { code=$$?; \
		echo "[test-numerics] FAILED with exit code $$code. Remedy: the failures above; the same environment again, with FILE::TEST" >&2; exit $$code; }

test-slow: ## the long tests: faults in live runs, restarts, clusters, vLLM with adapters
	$(SETUP) --extras $(TEST_EXTRAS)
	@$(BIN)/pytest -m "slow and not gpu" $(ARGS) || { code=$$?; \
		echo "[test-slow] FAILED with exit code $$code. Remedy: the failures above" >&2; exit $$code; }

test-gpu: ## run the tests that need a GPU, in the same environment
	$(SETUP) --extras $(TEST_EXTRAS)
	@$(BIN)/pytest -m "gpu and not soak" $(ARGS) || { code=$$?; \
		echo "[test-gpu] FAILED with exit code $$code. Remedy: the failures above; nvidia-smi must list a GPU" >&2; exit $$code; }

lint: ## ruff check, ruff format --check, mypy of rft/ and the contracts between packages
	$(SETUP) --extras $(TEST_EXTRAS)
	@echo "[lint] ruff check"; $(BIN)/ruff check . || { echo "[lint] FAILED: ruff check. Remedy: $(VENV)/bin/ruff check --fix ." >&2; exit 1; }
	@echo "[lint] ruff format --check"; $(BIN)/ruff format --check . || { echo "[lint] FAILED: ruff format. Remedy: make format" >&2; exit 1; }
	@echo "[lint] mypy (a minute the first time)"; $(BIN)/mypy || { echo "[lint] FAILED: mypy. Remedy: the errors above" >&2; exit 1; }
	@echo "[lint] lint-imports"; $(BIN)/lint-imports --no-cache || { echo "[lint] FAILED: lint-imports. Remedy: the imports above; docs/architecture.md names the layers" >&2; exit 1; }

format: ## put the code into ruff's format
	$(SETUP) --extras $(TEST_EXTRAS)
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

docs: ## build the documentation into build/docs/index.html; warnings are errors
	$(SETUP) --extras docs
	@echo "[docs] sphinx-build -W docs build/docs"
	@$(BIN)/sphinx-build -W --keep-going -q -j auto $(ARGS) docs build/docs || { code=$$?; \
		echo "[docs] FAILED with exit code $$code. Remedy: the warnings above, each with its file and line" >&2; exit $$code; }
	@echo "[docs] build/docs/index.html"

bench: ## measure on the CPU, also the peers (under 30 minutes), results into benchmarks/results/; ARGS='prefix': a part
	$(SETUP) --extras $(TEST_EXTRAS)
	@$(BIN)/rft bench $(or $(ARGS),all --peers)

bench-gpu: ## measure on a GPU, part by part; a second call goes on where the first stopped
	$(SETUP) --extras $(TEST_EXTRAS)
	@PYTHON=$(BIN)/python benchmarks/gpu/run_all.sh $(ARGS)

clean: ## remove the environment and all caches (runs/ stays)
	rm -rf "$(VENV)" "$(VENV)-setup.log" build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rft tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

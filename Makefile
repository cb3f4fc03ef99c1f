# One virtual environment for all targets; each target first updates it if pyproject.toml or constraints.txt is newer.
.DEFAULT_GOAL := help
SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
FAULTS ?= 300
OUT ?= benchmarks/results
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed compiles its ops on first use, not at installation.
export DS_BUILD_OPS := 0

.PHONY: help run test test-long test-architectures test-gpu rehearse-gpu chaos soak check bench-data bench-sft bench-gpu gpu-kit down clean purge

help:  ## list all targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: $(VENV)/ready  ## retrain once: servers, data, training, gate, registry, scoreboard
	@$(BIN)/nightshift run

test: $(VENV)/ready  ## run all tests except the slow ones
	@# Two test files in parallel: tests spend as much time waiting for servers and ranks as computing.
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test-long: $(VENV)/ready  ## run the slow tests: every strategy, every failure mode
	@$(BIN)/python -m pytest -m long

check: $(VENV)/ready  ## check lint, types and params.yaml
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m tasks.check

bench-data: $(VENV)/ready  ## benchmark data preparation (half an hour); installs the extra bench
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	@$(BIN)/python -m benchmarks.data

bench-sft: $(VENV)/ready  ## benchmark training on a CPU (most of an hour)
	@$(BIN)/python -m benchmarks.fused
	@$(BIN)/python -m benchmarks.cpu_step
	@$(BIN)/python -m benchmarks.sft

bench-gpu: $(VENV)/ready  ## benchmark training on an NVIDIA GPU; needs the extra gpu
	@$(BIN)/python -m benchmarks.gpu

test-architectures: $(VENV)/ready  ## train small models of all architectures, write docs/architectures.md (four minutes)
	@$(BIN)/python -m pytest -m long tests/integration/test_architectures.py

chaos: $(VENV)/ready  ## plant FAULTS=300 faults into real nights (hours), write benchmarks/results/chaos.json
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  $(BIN)/python -m tests.chaos "$$folder/nights" --faults $(FAULTS) --out "$(OUT)"

soak: $(VENV)/ready  ## run a month of nights with growing data and faults (half an hour), write soak.json
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  $(BIN)/python -m tests.soak "$$folder/nights" --out "$(OUT)"

test-gpu: $(VENV)/ready  ## test training on an NVIDIA GPU (nine minutes); needs the extra gpu
	@$(BIN)/python -m tests.gpu --out benchmarks/results --work "$$(mktemp -d)"

gpu-kit: $(VENV)/ready  ## fill .kit with wheels for test-gpu and bench-gpu on a bare GPU machine (docs/training.md)
	@bash infra/gpu_kit/fill.sh .kit

rehearse-gpu: $(VENV)/ready  ## run small versions of test-gpu and bench-gpu on this machine
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  $(BIN)/python -m tests.gpu --rehearse --at-once 2 --out "$$folder" --work "$$folder/work" && \
	  $(BIN)/python -m benchmarks.gpu --rehearse --out "$$folder"

down:  ## stop everything that `make run` started
	@if [ -x $(BIN)/nightshift ]; then $(BIN)/nightshift down; else echo "nothing is installed"; fi

clean: down  ## delete what is installed and compiled; data, models and databases stay
	rm -rf $(VENV) .kit .nightshift/kernels .nightshift/torch-extensions

purge: down  ## delete everything but the code: data, models, the registry, the DVC remote .dvc/remote; asks, unless YES=1
	@du -sch data .dvc/cache .dvc/remote .nightshift 2>/dev/null || true
	@[ -z "$$NIGHTSHIFT_HOME" ] || echo "NIGHTSHIFT_HOME=$$NIGHTSHIFT_HOME stays, with the registry in it; delete it yourself"
	@[ "$(YES)" = 1 ] || { read -rp "Delete all of this, with the registry and every model? [y/N] " answer; [ "$$answer" = y ]; }
	rm -rf $(VENV) .kit .nightshift data .dvc/cache .dvc/remote .dvc/tmp dvc.lock prefect.toml
	@# The branches of the runs name data that is gone.
	@git for-each-ref --format='delete %(refname)' refs/heads/runs 2>/dev/null | git update-ref --stdin 2>/dev/null || true

$(VENV)/ready: pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) VENV=$(VENV) bash infra/install.sh
	@touch $@

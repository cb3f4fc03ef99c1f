# One environment for all targets. Every target installs it first if constraints.txt is newer.
.DEFAULT_GOAL := help
SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# DeepSpeed compiles its operators when they are first used, not at installation.
export DS_BUILD_OPS := 0

.PHONY: help run test test-long test-gpu rehearse-gpu check bench-data bench-sft bench-gpu gpu-kit down clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

run: $(VENV)/ready  ## retrain once: servers, data, training, gate, registry, scoreboard
	@$(BIN)/nightshift run

test: $(VENV)/ready  ## run all tests but the slow ones
	@# Two files at a time: tests wait for servers and ranks as long as they compute.
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

test-long: $(VENV)/ready  ## run the slow tests: every strategy, every way to fail
	@$(BIN)/python -m pytest -m long

check: $(VENV)/ready  ## lint, types, and params.yaml
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/python -m tasks.check

bench-data: $(VENV)/ready  ## measure the data preparation (half an hour); needs the extra bench
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	@$(BIN)/python -m benchmarks.data

bench-sft: $(VENV)/ready  ## measure the training on a processor (most of an hour)
	@$(BIN)/python -m benchmarks.fused
	@$(BIN)/python -m benchmarks.sft

bench-gpu: $(VENV)/ready  ## measure the training on an NVIDIA GPU; needs the extra gpu
	@$(BIN)/python -m benchmarks.gpu

test-gpu: $(VENV)/ready  ## test the training on an NVIDIA GPU, in nine minutes; needs the extra gpu
	@$(BIN)/python -m tests.gpu --out benchmarks/results --work "$$(mktemp -d)"

gpu-kit: $(VENV)/ready  ## fill .kit with what a bare GPU machine needs for both (docs/training.md)
	@bash infra/gpu_kit/fill.sh .kit

rehearse-gpu: $(VENV)/ready  ## run what test-gpu and bench-gpu run, small, on this machine
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  $(BIN)/python -m tests.gpu --rehearse --at-once 2 --out "$$folder" --work "$$folder/work" && \
	  $(BIN)/python -m benchmarks.gpu --rehearse --out "$$folder"

down:  ## stop what `make run` started
	@if [ -x $(BIN)/nightshift ]; then $(BIN)/nightshift down; else echo "nothing is installed"; fi

clean: down  ## remove the environment, state and data; the code stays
	rm -rf $(VENV) .kit .nightshift data .dvc/cache .dvc/tmp dvc.lock prefect.toml

$(VENV)/ready: pyproject.toml constraints.txt
	@PYTHON=$(PYTHON) VENV=$(VENV) bash infra/install.sh
	@touch $@

# make demo: bring a cluster up, serve a dozen prompts, print where their time went, take it down.
# make test: every test, lint and type check.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTOS := tidemill/proto/inference.proto tidemill/core/control.proto

.PHONY: help env demo test lint types unit e2e identity switches docs bench protos clean

help:
	@grep -E '^# make' Makefile | sed 's/^# //'

env: $(VENV)/.installed

$(VENV)/.installed: requirements/dev.txt pyproject.toml
	@echo "making the environment in $(VENV) (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tidemill needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: env
	@$(BIN)/tidemill demo

# make unit: the tests that need no process but their own, under a minute.
unit: env
	$(BIN)/python -m pytest tests/unit tests/contract

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: env
	$(BIN)/mypy

e2e: env
	$(BIN)/python -m pytest tests/e2e

test: lint types env
	$(BIN)/python -m pytest tests

# make identity: the same tokens through every way, for all held-out prompts.
identity: env
	$(BIN)/python -m pytest tests/e2e/test_identity.py --all-prompts --timeout 1200

# make switches: 60 changes of role in a row under streaming load.
switches: env
	$(BIN)/python -m pytest tests/e2e/test_moves.py -k changes_of_role --all-switches --timeout 1200

# make docs: the pages that are made from declarations.
docs: env
	$(BIN)/python docs/build.py

# make bench: the measurements of the README, against vLLM on the same core (makes a second environment for it).
bench: env .venv-vllm/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/bench-serve.txt
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.kv_link
	$(BIN)/python -m benchmarks.migration
	$(BIN)/python -m benchmarks.router_throughput --ray-serve

.venv-vllm/.installed: requirements/bench-vllm.txt
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/bench-vllm.txt
	@touch $@

# make protos: the generated code beside the .proto files.
protos: env
	for proto in $(PROTOS); do $(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=. --mypy_grpc_out=. $$proto; done

clean:
	rm -rf $(VENV) .venv-vllm build dist *.egg-info

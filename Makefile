# `make help` lists the targets. Every target that needs Python makes .venv first; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ARGS ?=

.DEFAULT_GOAL := help
IN_PARALLEL := --numprocesses=auto --dist=loadfile

.PHONY: help setup train test test-all check ui bench bench-setup clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED) ## make .venv and install the project with the tested versions

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lmtrain needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

train: $(INSTALLED) ## train the default model (ARGS="lr=1e-3 ..." to change it)
	@$(BIN)/python -m lmtrain $(ARGS)

test: $(INSTALLED) ## run the tests of a few minutes, on all cores
	@$(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)

test-all: $(INSTALLED) ## run every test; the long ones one after the other, as some measure time and memory
	@$(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)
	@$(BIN)/python -m pytest -m slow $(ARGS)

check: $(INSTALLED) ## lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

ui: $(INSTALLED) ## open the MLflow UI on 127.0.0.1 (PORT=5000)
	@MLFLOW_DISABLE_TELEMETRY=true $(BIN)/mlflow ui --host 127.0.0.1 --port $(or $(PORT),5000) \
		--backend-store-uri $(or $(MLFLOW_TRACKING_URI),sqlite:///mlflow.db)

bench-setup: $(INSTALLED) ## install the peers that benchmarks compare with
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@# litgpt asks for an older huggingface_hub than transformers needs; its model and loss use neither.
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps litgpt

bench: $(INSTALLED) ## measure the figures of the README again (ARGS=--quick: for seconds; ARGS="--text input.txt")
	@$(BIN)/python benchmarks/suite.py $(ARGS)

clean: ## remove .venv and caches, never runs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist

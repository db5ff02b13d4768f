# Every verb of this repository. `make help` lists them; CI runs `make check test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# One version, and on this platform the build without CUDA; the package itself declares a range.
TORCH := torch==2.13.0
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --progress-bar off
export PYTHONUNBUFFERED := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs

help: ## List the verbs
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(STAMPS)/installed $(STAMPS)/demo ## Rehearse a retirement on real models: record, plan, own, prove, certify, move
	$(BIN)/understudy drill --config demo/understudy.toml

test: $(STAMPS)/installed $(STAMPS)/demo ## Run every test that needs no GPU
	$(BIN)/python -m pytest -q -m "not gpu"

check: $(STAMPS)/installed ## Lint, format, types, import direction, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python docs/commands.py --check

bench: $(STAMPS)/installed $(STAMPS)/demo $(STAMPS)/bench ## Measure speed, memory and quality; write bench/RESULTS.md
	$(BIN)/python bench/run.py

docs: $(STAMPS)/installed ## Write the generated pages of docs
	$(BIN)/python docs/commands.py
	$(BIN)/python docs/architectures.py

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; expected Python 3.11; next: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/torch: $(VENV)/bin/python
	@echo "installing $(TORCH) …"
	$(PIP) --no-cache-dir $(TORCH)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/installed: requirements.lock pyproject.toml | $(STAMPS)/torch
	@echo "installing locked packages …"
	$(PIP) --no-deps --require-hashes -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(STAMPS)/demo: demo/requirements.lock | $(STAMPS)/torch
	@echo "installing the demo's model and benchmark items …"
	$(PIP) --no-deps --require-hashes -r demo/requirements.lock
	@touch $@

# Peers measured beside us are no dependency of the product; those that cannot be installed are left out and named.
$(STAMPS)/bench: bench/requirements.txt bench/gateway-peers.txt | $(STAMPS)/installed
	@echo "installing peers to measure beside …"
	-$(PIP) -r bench/requirements.txt
	-$(PYTHON) -m venv $(VENV)/peers && $(VENV)/peers/bin/python -m pip install --quiet --progress-bar off -r bench/gateway-peers.txt
	@touch $@

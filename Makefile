# make demo        the whole mini study, from study file to report
# make ui          Dagster's web interface on 127.0.0.1:3000
# make test        lint and tests
# make test-vllm   the tests of the vLLM engine, with its build for CPUs in a venv of its own
# make reliability what an operator fears, done on purpose and counted
# make scale       machines on object storage, Postgres restarted, a Ray node lost, all in real work;
#                  and every condition of the real data
# Each works alone on a fresh machine; the first one installs.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
VLLM_VENV := $(CURDIR)/.venv-vllm
VLLM_TESTS := persona_assets_tests/vllm

export DAGSTER_HOME := $(CURDIR)
export PERSONA_ASSETS_DATA := $(abspath $(or $(PERSONA_ASSETS_DATA),data))
export PERSONA_ASSETS_DAGSTER := $(abspath $(or $(PERSONA_ASSETS_DAGSTER),$(PERSONA_ASSETS_DATA)/dagster))

.PHONY: install demo ui test test-vllm reliability scale lint clean
.DEFAULT_GOAL := demo

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/persona-assets run --study mini

ui: install
	$(BIN)/persona-assets ui

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint
	$(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -rs

# Its warnings are not those of pyproject.toml, which name Dagster's: that is not installed there.
test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS) -rs --override-ini filterwarnings=ignore

$(VLLM_VENV)/.installed: $(VLLM_TESTS)/requirements.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint $< torch
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

reliability: install
	$(BIN)/python -m persona_assets_tests.reliability --results $(PERSONA_ASSETS_DATA)/reliability

scale: install
	$(BIN)/pytest -m heavy -rs

clean:
	rm -rf $(PERSONA_ASSETS_DATA)/store $(PERSONA_ASSETS_DATA)/registry $(PERSONA_ASSETS_DAGSTER)

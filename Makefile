# make demo   the whole mini study, from study file to report
# make ui     Dagster's web interface on 127.0.0.1:3000
# make test   lint and tests
# Each works alone on a fresh machine; the first one installs.

PYTHON ?= python3
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin

export DAGSTER_HOME := $(CURDIR)
export PERSONA_ASSETS_DATA := $(abspath $(or $(PERSONA_ASSETS_DATA),data))
export PERSONA_ASSETS_DAGSTER := $(abspath $(or $(PERSONA_ASSETS_DAGSTER),$(PERSONA_ASSETS_DATA)/dagster))

.PHONY: install demo ui test lint clean
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
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -rs

clean:
	rm -rf $(PERSONA_ASSETS_DATA)/store $(PERSONA_ASSETS_DATA)/registry $(PERSONA_ASSETS_DAGSTER)

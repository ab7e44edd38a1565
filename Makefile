# Needs nothing but Python 3.11+ and make. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help install demo test test-all lint format bench compare signal clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch first and pinned: an unpinned one pulls gigabytes of CUDA on Linux.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(VENV)/installed  ## make .venv with the CPU build of torch and everything for development

demo: $(VENV)/installed  ## from nothing to an agent that solves held-out Sokoban levels, about 10 minutes
	$(RUN) -m agentrl demo

test: $(VENV)/installed  ## lint, types and the test suite, as CI runs them
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -m "not slow"

test-all: $(VENV)/installed  ## the slow tests too
	$(RUN) -m pytest

lint: $(VENV)/installed  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: $(VENV)/installed  ## format the code
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

bench: $(VENV)/installed  ## speed of one iteration, and of the sampler against model.generate
	$(RUN) benchmarks/step.py
	$(RUN) benchmarks/sampler.py

compare: $(VENV)/installed  ## OPRL, RLOO, GRPO and OPRL as published, 3 seeds each, from the demo's base model (about 30 minutes)
	$(RUN) benchmarks/compare.py --methods oprl,rloo,grpo,oprl-paper iterations=50

signal: $(VENV)/installed  ## turn rewards against the exact advantage of every turn (about 15 minutes)
	$(RUN) benchmarks/credit_signal.py configs/sokoban_oprl.yaml --variants all iterations=12 rollout.groups=16

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs

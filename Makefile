# Needs nothing but Python 3.11+ and make. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help install demo test test-all lint format bench benchmark lab clean

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

benchmark: $(VENV)/installed  ## every credit method, two environments, three seeds; goes on where it stopped (about 2 hours on 2 cores)
	$(RUN) -m agentrl benchmark benchmarks/suite.yaml

lab: $(VENV)/installed  ## credit methods against the exact advantage of every turn (about 20 minutes)
	$(RUN) -m agentrl credit-lab

clean:  ## remove the environment and all runs
	rm -rf $(VENV) runs

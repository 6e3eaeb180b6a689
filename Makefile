PYTHON ?= $(or $(shell for python in python3.11 python3.12 python3.13 python3; do $$python -c \
  'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$python && break; done),$(error \
  needs Python 3.11 or later with its venv: neither python3.11, python3.12, python3.13 nor python3 is one; install it \
  (on Debian and Ubuntu python3-venv too) or give its path: make PYTHON=…))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FRAMEWORKS := .venv-frameworks
VISION := .venv-vision
TESTS_NEED := filelock hypothesis pytest pytest-timeout pytest-xdist scipy
CPU_INDEX := https://download.pytorch.org/whl/cpu
# Bytecode is kept, whatever the machine says: compiling the tests and the package takes every worker ten seconds.
TEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal
# The files with such tests alone: others import what these environments do not have.
marked = $(shell grep -rlE --include='test_*.py' 'mark\.$(1)|"$(1)"' tests)

.PHONY: train test pytest test-all test-gpu test-browser test-frameworks test-vision cluster-test faults fuzz check-matrix figure figure-fashion lint setup clean

train: $(READY)  ## train the embedded digits at 8 times their base minibatch on 2 processes, or a GPU each
	$(BIN)/onehour train digits --minibatch 256 --processes auto --fresh

test: $(READY)  ## what CI runs: linters and tests side by side
	$(MAKE) --no-print-directory --jobs 2 lint pytest

pytest: $(READY)
	$(TEST) -m "not slow and not gpu and not browser and not frameworks and not vision"

test-all: lint  ## every test, those that take long too
	ONEHOUR_TEST_ALL=1 $(TEST) -m "not browser and not frameworks and not vision and not gpu"

test-gpu: $(READY)  ## those that need a GPU, which the others do not see
	$(BIN)/python -m pytest -m gpu tests

test-browser: $(READY)  ## a report in headless Chromium, which is installed where it is missing
	@{ command -v chromium && command -v chromedriver; } > /dev/null \
	  || { test "$$(id -u)" = 0 && apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver; } \
	  || { echo "needs Chromium and its driver; as root: apt-get install chromium chromium-driver"; exit 2; }
	$(BIN)/python -m pytest -m browser tests/browser

cluster-test: $(READY)  ## runs on a real Slurm of several nodes on this machine, each disturbed (as root, on Debian; ten minutes)
	$(BIN)/python -m campaigns.cluster.cases

test-frameworks: $(FRAMEWORKS)/.ready  ## with Lightning, Accelerate and Transformers, in an environment of their own; a skip fails
	$(FRAMEWORKS)/bin/python -m pytest -n 2 --dist worksteal -m frameworks $(call marked,frameworks)

test-vision: $(VISION)/.ready  ## with torchvision, timm, albumentations, and a newer torch, in an environment of their own; a skip fails
	$(VISION)/bin/python -m pytest -n 2 --dist worksteal -m vision $(call marked,vision)

faults: $(READY)  ## kill, stop, corrupt and fill up: runs must end as undisturbed ones do (two hours; resumable)
	for campaign in kills signals interrupts restarts together soak hosts writer disk corruptions hostile cli; do \
	  $(BIN)/python -m campaigns.$$campaign || exit 1; done
	$(BIN)/python -m campaigns.ledger
	$(BIN)/python docs/tables.py

fuzz: $(READY)  ## 20,000 damaged images of every format (half an hour; resumable)
	$(BIN)/python -m campaigns.fuzz_images
	$(BIN)/python docs/tables.py

check-matrix: $(READY)  ## every loop that `onehour check` is tested on (resumable; frameworks where they are installed)
	$(BIN)/python benchmarks/check_matrix.py
	$(BIN)/python docs/tables.py

figure: $(READY)  ## the digits' figure anew: error against minibatch, arms, pitfalls (half an hour; resumable)
	$(BIN)/python benchmarks/digits_figure.py
	$(BIN)/python docs/tables.py

figure-fashion: $(READY)  ## Fashion-MNIST's (needs dataset-fashion-mnist; 8 hours on two cores, minutes on a GPU; resumable)
	$(BIN)/python benchmarks/fashion_figure.py
	$(BIN)/python docs/tables.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

setup: $(READY)

# torch first and by its exact version: a looser request downloads gigabytes on a machine without a GPU.
define torch
	@index=; what="pip's own index; where that has no build for the CPU, CUDA's libraries come along: about 3 GB"; \
	if ! nvidia-smi -L > /dev/null 2>&1 && $(1)/bin/python -c \
	  'import urllib.request; urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=10)' 2> /dev/null; then \
	  index="--extra-index-url $(CPU_INDEX)"; what="$(CPU_INDEX): the build for the CPU, about 200 MB"; fi; \
	echo "installs $(3) from $$what"; \
	$(1)/bin/python -m pip install --quiet $$index --constraint $(2) $(3)
endef

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(call torch,$(VENV),constraints.txt,torch==2.13.0)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[report,onnx,tensorboard,dev]'
	touch $(READY)

$(FRAMEWORKS)/.ready: pyproject.toml constraints.txt constraints-frameworks.txt
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(call torch,$(FRAMEWORKS),constraints.txt,torch==2.13.0)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --constraint constraints.txt --constraint constraints-frameworks.txt \
	  --editable . lightning accelerate transformers $(TESTS_NEED)
	touch $(FRAMEWORKS)/.ready

$(VISION)/.ready: pyproject.toml constraints-vision.txt
	$(PYTHON) -m venv $(VISION)
	$(call torch,$(VISION),constraints-vision.txt,torch torchvision)
	$(VISION)/bin/python -m pip install --quiet --constraint constraints-vision.txt --editable . \
	  timm albumentations pycocotools $(TESTS_NEED)
	touch $(VISION)/.ready

clean:
	rm -rf $(VENV) $(FRAMEWORKS) $(VISION) .pytest_cache .ruff_cache .hypothesis dist build

PYTHON ?= $(or $(shell for python in python3.11 python3.12 python3.13 python3; do $$python -c \
  'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$python && break; done),$(error \
  needs Python 3.11 or later with its venv: neither python3.11, python3.12, python3.13 nor python3 is one; install it \
  (on Debian and Ubuntu python3-venv too) or give its path: make PYTHON=…))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FRAMEWORKS := .venv-frameworks
TEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: train test test-all test-gpu test-browser test-frameworks cluster-test faults fuzz check-matrix figure lint setup clean

train: $(READY)  ## train the embedded digits at 8 times their base minibatch on 2 processes, or a GPU each
	$(BIN)/onehour train digits --minibatch 256 --processes auto --fresh

test: lint  ## what CI runs
	$(TEST) -m "not slow and not gpu and not browser and not frameworks"

test-all: lint  ## every test, those that take long too
	$(TEST) -m "not browser and not frameworks and not gpu"

test-gpu: $(READY)  ## those that need a GPU, which the others do not see
	$(BIN)/python -m pytest -m gpu tests

test-browser: $(READY)  ## a report in headless Chromium, which is installed where it is missing
	@{ command -v chromium && command -v chromedriver; } > /dev/null \
	  || { test "$$(id -u)" = 0 && apt-get update -q && apt-get install -y -q --no-install-recommends chromium chromium-driver; } \
	  || { echo "needs Chromium and its driver; as root: apt-get install chromium chromium-driver"; exit 2; }
	$(BIN)/python -m pytest -m browser tests/browser

cluster-test: $(READY)  ## runs on a real Slurm of several nodes on this machine, each disturbed (as root, on Debian; ten minutes)
	$(BIN)/python tests/cluster/cases.py

test-frameworks: $(FRAMEWORKS)/.ready  ## the sampler under Lightning, Accelerate and Transformers, in an environment of their own
	$(FRAMEWORKS)/bin/python -m pytest -n 2 --dist worksteal tests/frameworks

faults: $(READY)  ## kill, stop, corrupt and fill up: runs must end as undisturbed ones do (two hours; resumable)
	for campaign in kills signals interrupts restarts together soak hosts writer disk corruptions hostile cli; do \
	  $(BIN)/python tests/faults/$$campaign.py || exit 1; done
	$(BIN)/python tests/faults/summary.py
	$(BIN)/python docs/tables.py

fuzz: $(READY)  ## 20,000 damaged images of every format (half an hour; resumable)
	$(BIN)/python tests/fuzz_images.py
	$(BIN)/python docs/tables.py

check-matrix: $(READY)  ## every loop that `onehour check` is tested on (resumable; frameworks where they are installed)
	$(BIN)/python benchmarks/check_matrix.py
	$(BIN)/python docs/tables.py

figure: $(READY)  ## the digits' figure anew: error against minibatch, arms, pitfalls (half an hour; resumable)
	$(BIN)/python benchmarks/digits_figure.py
	$(BIN)/python docs/tables.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

setup: $(READY)

# torch first and by its exact version: a looser request downloads gigabytes on a machine without a GPU.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[report,tensorboard,dev]'
	touch $(READY)

$(FRAMEWORKS)/.ready: pyproject.toml constraints.txt constraints-frameworks.txt
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(FRAMEWORKS)/bin/python -m pip install --quiet --constraint constraints.txt --constraint constraints-frameworks.txt \
	  --editable . lightning accelerate transformers filelock pytest pytest-timeout pytest-xdist
	touch $(FRAMEWORKS)/.ready

clean:
	rm -rf $(VENV) $(FRAMEWORKS) .pytest_cache .ruff_cache .hypothesis dist build

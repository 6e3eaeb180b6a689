PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: train test test-all lint setup clean

train: $(READY)  ## train the embedded digits at 8 times their base minibatch on 2 processes
	$(BIN)/onehour train digits --minibatch 256 --processes 2 --fresh

test: lint  ## what CI runs
	$(TEST) -m "not slow and not gpu"

test-all: lint  ## every test, those that take long too; GPU tests where there is one
	$(TEST)

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

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist build

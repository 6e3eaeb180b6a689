"""The loops are scripts to be run, not modules with tests; one process has torch imported for all of them."""

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from onehour.check.run.forkserver import ForkServer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
collect_ignore_glob = ["loops/*"]


@pytest.fixture(scope="session")
def forkserver() -> Iterator[ForkServer]:
    """Starts scripts at once."""
    with ForkServer() as forkserver:
        yield forkserver


@pytest.fixture(scope="session")
def matrix() -> Iterator[ModuleType]:
    """benchmarks/check_matrix.py, which reads the options in a loop's first line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("check_matrix")

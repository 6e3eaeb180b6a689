"""The loops are scripts to be run, not modules with tests; one process has torch imported for all of them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from onehour.check.run.forkserver import ForkServer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import check_matrix as matrix

collect_ignore_glob = ["loops/*"]


@pytest.fixture(scope="session")
def forkserver() -> Iterator[ForkServer]:
    """Starts scripts at once."""
    with matrix.starting() as forkserver:
        yield forkserver


@pytest.fixture(scope="session")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts of all plain pairs: ID_broken.py, ID_fixed.py."""
    folder = tmp_path_factory.mktemp("loops")
    for loop in matrix.loops():
        if loop.kind != "right" and loop.framework is None:
            loop.write(folder)
    return folder

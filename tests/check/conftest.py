"""The loops are scripts to be run, not modules with tests; one process has torch imported for all of them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from onehour.check.run import checking
from onehour.check.run.forkserver import ForkServer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import check_matrix as matrix

collect_ignore_glob = ["loops/*"]


@pytest.fixture(scope="session")
def forkserver() -> Iterator[ForkServer]:
    """Starts scripts at once."""
    with matrix.starting() as forkserver:
        yield forkserver


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, forkserver: ForkServer) -> None:
    """Without waiting for torch each time."""
    monkeypatch.setattr(checking, "check_script", partial(checking.check_script, forkserver=forkserver))


@pytest.fixture
def checked(forkserver: ForkServer, tmp_path: Path) -> Callable[..., checking.Checked]:
    """What comes of a script, by its text, as train.py in a folder of its own."""

    def run(text: str, arguments: Sequence[str] = (), **options: Any) -> checking.Checked:
        (tmp_path / "train.py").write_text(text, encoding="utf-8")
        given = {"forkserver": forkserver, "limit": 60, "cwd": tmp_path} | options
        return checking.check_script(tmp_path / "train.py", arguments, **given)

    return run


@pytest.fixture
def found(checked: Callable[..., checking.Checked]) -> Callable[..., list[str]]:
    """What is found in a script, by its text."""
    return lambda *text, **options: [finding.pitfall for finding in checked(*text, **options).findings]


@pytest.fixture(scope="session")
def loops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts of all plain pairs: ID_broken.py, ID_fixed.py."""
    folder = tmp_path_factory.mktemp("loops")
    for loop in matrix.loops():
        if loop.kind != "right" and loop.framework is None:
            loop.write(folder)
    return folder

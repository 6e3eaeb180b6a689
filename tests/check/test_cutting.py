"""A cut epoch makes no finding and hides none: every plain pair again, its passes cut as early as can be."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from onehour.check.case import Base
from onehour.check.run.checking import check_script
from onehour.check.run.forkserver import ForkServer

LOOPS = sorted((Path(__file__).parent / "loops").glob("*_*.py"))
EARLY = """import onehour.check.observe.passes as p
p.WHOLE, p.UNCUT_SECONDS, p.HEAD_UPDATES, p.EVALUATION_BATCHES = 4, 0.0, 2, 1
"""
"""A module that the process with torch imports before any script: no pass is too short to be cut."""


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    folder = tmp_path_factory.mktemp("hasty")
    (folder / "cut_early.py").write_text(EARLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        with ForkServer(preload=["cut_early"]) as forkserver:
            yield forkserver


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_a_cut_changes_no_finding(path: Path, hasty: ForkServer, tmp_path: Path):
    line = path.read_text(encoding="utf-8").splitlines()[0]
    given = {name: float(value) for name, value in re.findall(r"--base-([\w-]+) (\S+)", line)}
    minibatch, per_worker = (int(given[key]) if key in given else None for key in ("minibatch", "per-worker"))
    skip = [text for found in re.findall(r"--skip (\S+)", line) for text in found.split(",")]
    base = Base(given.get("lr"), minibatch, per_worker)
    checked = check_script(path, base=base, skip=skip, forkserver=hasty, cwd=tmp_path)
    found = {finding.pitfall: finding.measured for finding in checked.findings}
    assert list(found) == ([path.stem.partition("_")[0]] if path.stem.endswith("_broken") else []), found


def test_passes_are_cut_here(hasty: ForkServer, tmp_path: Path):
    path = next(path for path in LOOPS if path.stem == "double-step_fixed")
    (story,) = check_script(path, forkserver=hasty, cwd=tmp_path).stories
    assert [event.cut for event in story.ends(0)] == [True, True]
    assert all(event.taken < 8 for event in story.ends(0))

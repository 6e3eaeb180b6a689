"""Every broken loop raises exactly its pitfall, every corrected twin none, and the place is in the user's file."""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from onehour.check.case import Base
from onehour.check.catalogue import PITFALLS
from onehour.check.judge import JUDGES
from onehour.check.runner import Checked, Nursery, check_script

LOOPS = sorted((Path(__file__).parent / "loops").glob("*_*.py"))
PLACES: dict[str, str | None] = {}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """torch is imported once for all."""
    with Nursery() as nursery:
        yield nursery


def check(path: Path, nursery: Nursery) -> Checked:
    """With the options that a loop's first line names."""
    line = path.read_text(encoding="utf-8").splitlines()[0]
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-lr", type=float)
    parser.add_argument("--base-minibatch", type=int)
    parser.add_argument("--base-per-worker", type=int)
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[])
    options = parser.parse_args(shlex.split(line.removeprefix("# check:")) if line.startswith("# check:") else [])
    base = Base(options.base_lr, options.base_minibatch, options.base_per_worker)
    return check_script(path, base=base, skip=options.skip, nursery=nursery, limit=60)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_a_broken_loop_raises_its_pitfall_alone_and_a_right_one_none(path: Path, nursery: Nursery):
    pitfall, _, kind = path.stem.rpartition("_")
    checked = check(path, nursery)
    assert [finding.pitfall for finding in checked.findings] == ([pitfall.split("__")[0]] if kind == "broken" else [])
    for story in checked.stories:
        assert not list(story.tape.of("trouble"))
    for finding in checked.findings:
        assert finding.where is not None
        file, _, line = finding.where.rpartition(":")
        assert Path(file) == path
        assert 0 < int(line) <= len(path.read_text(encoding="utf-8").splitlines())


def test_every_pitfall_has_a_broken_loop_and_a_corrected_twin():
    names = {path.stem for path in LOOPS}
    for pitfall in JUDGES:
        assert {f"{pitfall}_broken", f"{pitfall}_fixed"} <= names
    assert {name.rpartition("_")[0] + "_fixed" for name in names} <= names


def test_every_judge_is_in_the_catalogue():
    assert set(JUDGES) <= set(PITFALLS)


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_a_loop_is_a_script_of_a_page(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60

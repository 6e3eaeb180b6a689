"""Pitfalls in loops of Accelerate, Lightning, the HF Trainer and timm: each broken one raises its own alone."""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from onehour.check.case import Base
from onehour.check.catalogue import PITFALLS
from onehour.check.runner import Nursery, check_script

SCRIPTS = sorted((Path(__file__).parent / "loops" / "frameworks").glob("*.py"))
PACKAGES = {"accelerate": "accelerate", "hf": "transformers", "lightning": "lightning", "timm": "timm"}


def parts(path: Path) -> tuple[str, str, str]:
    """The pitfall, the framework and the kind in a script's name."""
    pitfall, framework, kind = path.stem.split("_")
    return pitfall, framework.partition("-")[0], kind


def base_of(path: Path) -> Base:
    """What a script's first line says."""
    line = path.read_text(encoding="utf-8").splitlines()[0]
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-lr", type=float)
    parser.add_argument("--base-minibatch", type=int)
    given = parser.parse_args(shlex.split(line.removeprefix("# check:")) if line.startswith("# check:") else [])
    return Base(given.base_lr, given.base_minibatch)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """torch is imported once for all."""
    with Nursery() as nursery:
        yield nursery


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_broken_loop_raises_its_pitfall_alone_and_its_twin_none(path: Path, nursery: Nursery, tmp_path: Path):
    pitfall, framework, kind = parts(path)
    package = PACKAGES[framework]
    pytest.importorskip(package, reason=f"{path.name} needs {package}", exc_type=ImportError)
    checked = check_script(path, base=base_of(path), nursery=nursery, cwd=tmp_path)
    found = {f.pitfall: f.measured for f in checked.findings}
    assert list(found) == ([pitfall] if kind == "broken" else []), found
    assert [event.facts for story in checked.stories for event in story.tape.of("trouble")] == []
    for finding in checked.findings:
        assert finding.where is not None
        file, _, line = finding.where.rpartition(":")
        assert Path(file) == path
        assert 0 < int(line) <= len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_names_its_pitfall_and_has_its_twin(path: Path):
    pitfall, framework, kind = parts(path)
    assert pitfall in PITFALLS
    assert framework in PACKAGES
    twin = {"broken": "fixed", "fixed": "broken"}[kind]
    assert path.with_name(f"{path.stem.removesuffix(kind)}{twin}.py").exists()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[1 if lines[0].startswith("# check:") else 0].startswith("# ")

"""Nothing is found in right loops of many styles, on one process and on two."""

import argparse
import shlex
from pathlib import Path

import pytest

from onehour.check.case import Base
from onehour.check.runner import Nursery, check_script

RIGHT = sorted((Path(__file__).parent / "loops" / "right").glob("*.py"))
NEEDS = {
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
    "lightning_module": "lightning",
    "timm_train": "timm",
}


def options(path: Path) -> argparse.Namespace:
    """What a script's first line says."""
    line = path.read_text(encoding="utf-8").splitlines()[0]
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-lr", type=float)
    parser.add_argument("--base-minibatch", type=int)
    parser.add_argument("--base-per-worker", type=int)
    return parser.parse_args(shlex.split(line.removeprefix("# check:")) if line.startswith("# check:") else [])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem in NEEDS else ()) for p in RIGHT],
)
def test_nothing_is_found_in_a_right_loop(path: Path, nursery: Nursery, tmp_path: Path):
    package = NEEDS.get(path.stem, "torch")
    pytest.importorskip(package, reason=f"{path.name} needs {package}", exc_type=ImportError)
    given = options(path)
    base = Base(given.base_lr, given.base_minibatch, given.base_per_worker)
    checked = check_script(path, base=base, nursery=nursery, cwd=tmp_path)
    assert [(f.pitfall, f.measured) for f in checked.findings] == []
    assert [event.facts for story in checked.stories for event in story.tape.of("trouble")] == []


def test_there_are_twelve_styles():
    assert len({path.stem.removeprefix("onehour_") for path in RIGHT}) >= 12
    assert set(NEEDS) <= {path.stem for path in RIGHT}


@pytest.mark.parametrize("path", RIGHT, ids=lambda path: path.stem)
def test_a_right_loop_declares_its_base(path: Path):
    given = options(path)
    assert given.base_lr is not None
    assert given.base_minibatch is not None

"""Nothing is found in right loops of many styles, on one process and on two."""

from pathlib import Path
from types import ModuleType

import pytest

from onehour.check.run.checking import check_script
from onehour.check.run.forkserver import ForkServer
from onehour.check.tape import Trouble

RIGHT = sorted((Path(__file__).parent / "loops" / "right").glob("*.py"))
NEEDS = {
    "accelerate_loop": "accelerate",
    "hf_trainer": "transformers",
    "lightning_module": "lightning",
    "timm_train": "timm",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem in NEEDS else ()) for p in RIGHT],
)
def test_nothing_is_found_in_a_right_loop(path: Path, matrix: ModuleType, forkserver: ForkServer, tmp_path: Path):
    package = NEEDS.get(path.stem, "torch")
    pytest.importorskip(package, reason=f"{path.name} needs {package}", exc_type=ImportError)
    checked = check_script(path, base=matrix.base_of(path), forkserver=forkserver, cwd=tmp_path)
    assert [(f.pitfall, f.measured) for f in checked.findings] == []
    assert [event for story in checked.stories for event in story.tape.of(Trouble)] == []


def test_there_are_twelve_styles():
    assert len({path.stem.removeprefix("onehour_") for path in RIGHT}) >= 12
    assert set(NEEDS) <= {path.stem for path in RIGHT}


@pytest.mark.parametrize("path", RIGHT, ids=lambda path: path.stem)
def test_a_right_loop_declares_its_base(path: Path, matrix: ModuleType):
    given = matrix.options(path)
    assert given.base_lr is not None
    assert given.base_minibatch is not None

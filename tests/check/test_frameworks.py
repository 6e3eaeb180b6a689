"""Pitfalls in loops of Accelerate, Lightning, the HF Trainer and timm: each broken one raises its own alone."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from onehour.check.judge import PITFALLS
from onehour.check.run.forkserver import ForkServer

SCRIPTS = sorted((Path(__file__).parent / "loops" / "frameworks").glob("*.py"))
PACKAGES = {"accelerate": "accelerate", "hf": "transformers", "lightning": "lightning", "timm": "timm"}


def parts(path: Path) -> tuple[str, str, str]:
    """The pitfall, the framework and the kind in a script's name."""
    pitfall, framework, kind = path.stem.split("_")
    return pitfall, framework.partition("-")[0], kind


@pytest.fixture(scope="module")
def forkserver(matrix: ModuleType) -> Iterator[ForkServer]:
    """torch and the frameworks are imported once for all."""
    with matrix.starting() as forkserver:
        yield forkserver


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_broken_loop_raises_its_pitfall_alone_and_its_twin_none(
    path: Path, matrix: ModuleType, forkserver: ForkServer
):
    pitfall, framework, kind = parts(path)
    (loop,) = [loop for loop in matrix.loops() if loop.path == path]
    if not loop.installed:
        pytest.skip(f"{path.name} needs {PACKAGES[framework]}")
    row = matrix.resumed(loop, forkserver)
    assert row["found"] == ([pitfall] if kind == "broken" else []), row["measured"]
    assert row["problems"] == []
    assert None not in row["lines"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_names_its_pitfall_and_has_its_twin(path: Path):
    pitfall, framework, kind = parts(path)
    assert pitfall in PITFALLS
    assert framework in PACKAGES
    twin = {"broken": "fixed", "fixed": "broken"}[kind]
    assert path.with_name(f"{path.stem.removesuffix(kind)}{twin}.py").exists()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[1 if lines[0].startswith("# check:") else 0].startswith("# ")

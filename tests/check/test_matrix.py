"""Every broken loop raises exactly its pitfall, every corrected twin none, and the place is in the user's file."""

import ast
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from onehour.check.judge import PITFALLS
from onehour.check.run.forkserver import ForkServer

LOOPS = sorted((Path(__file__).parent / "loops").glob("*_*.py"))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_a_broken_loop_raises_its_pitfall_alone_and_a_right_one_none(
    path: Path, matrix: ModuleType, forkserver: ForkServer
):
    (loop,) = [loop for loop in matrix.loops() if loop.path == path]
    row = matrix.judged(loop, forkserver)
    assert row["found"] == ([path.stem.partition("_")[0]] if path.stem.endswith("_broken") else []), row["measured"]
    assert row["problems"] == []
    assert None not in row["lines"]
    for write in row["write"]:
        assert 1 <= len(write) <= 3
        ast.parse("\n".join(write))  # lines of Python, with nothing left to fill in
        assert all(len(line) <= 108 for line in write)


def test_every_pitfall_has_a_broken_loop_and_a_corrected_twin():
    names = {path.stem for path in LOOPS}
    for pitfall in PITFALLS:
        assert {f"{pitfall}_broken", f"{pitfall}_fixed"} <= names
    assert {name.rpartition("_")[0] + "_fixed" for name in names} <= names


@pytest.mark.parametrize("path", LOOPS, ids=lambda path: path.stem)
def test_a_loop_is_a_script_of_a_page(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_the_matrix_holds_every_loop(matrix: ModuleType):
    loops = matrix.loops()
    assert {loop.path for loop in loops} == set(matrix.LOOPS.rglob("*.py"))
    assert {loop.kind for loop in loops} == {"broken", "fixed", "right"}
    assert {loop.pitfall for loop in loops if loop.kind == "broken"} == set(PITFALLS)


def test_what_is_known_for_the_same_content_is_not_run_again(
    matrix: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loop = matrix.loops()[0]
    runs: list[str] = []

    def judged(loop: Any, forkserver: Any) -> dict[str, Any]:
        runs.append(loop.name)
        return {"loop": loop.name, "ok": len(runs) > 1}

    monkeypatch.setattr(matrix, "LINES", tmp_path / "lines" / "matrix.jsonl")
    monkeypatch.setattr(matrix, "judged", judged)
    for times in (1, 2, 2, 2):  # what failed is run again, what was right is not
        matrix.resumed(loop, None)
        assert len(runs) == times
    with matrix.LINES.open("a", encoding="utf-8") as lines:
        lines.write('{"loop": "half a li')
    matrix.resumed(loop, None)
    assert len(runs) == 2
    monkeypatch.setattr(matrix, "code", lambda: b"another check")
    matrix.resumed(loop, None)
    assert len(runs) == 3


def test_a_digest_is_of_the_loop_too(matrix: ModuleType, tmp_path: Path):
    loop = matrix.loops()[0]
    copy = matrix.Loop(tmp_path / loop.path.name, loop.pitfall, loop.kind, None)
    copy.path.write_bytes(loop.path.read_bytes())
    assert copy.digest() == loop.digest()
    copy.path.write_bytes(loop.path.read_bytes() + b"\n")
    assert copy.digest() != loop.digest()

"""The diff of a check: it applies, it mends, and it says what it leaves."""

import ast
import shutil
import subprocess
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehour.check import runner
from onehour.check.case import Base, Case
from onehour.check.catalogue import PITFALLS
from onehour.check.finding import found
from onehour.check.remedies.changes import Changes, overlap
from onehour.check.remedies.edits import EDITS
from onehour.check.remedies.fix import Fix
from onehour.check.remedies.source import Source, UnsureError, lines_of
from onehour.check.runner import Nursery, check_script
from onehour.cli import main

LOOPS = Path(__file__).parent / "loops"
WITHOUT = {"batchnorm-n-changed", "decay-decoupled-scales-with-lr", "unused-gradients"}
"""Whose loop in the folder is not one that an edit is known for; test_remedies_variants.py has others."""
QUICK = {"accumulation-tail", "decay-on-batchnorm", "lr-not-scaled", "overlapping-shards"}
IDS = sorted(set(EDITS) - WITHOUT)


def applied(diff: str, folder: Path, how: str = "git") -> None:
    """As a user would, in the current folder of the check."""
    (folder / "x.diff").write_text(diff, encoding="utf-8")
    command = {"patch": ["patch", "-p0", "-i", "x.diff"], "git": ["git", "apply", "x.diff"]}[how]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(120)
@pytest.mark.parametrize("pitfall", [pytest.param(i, marks=() if i in QUICK else pytest.mark.slow) for i in IDS])
def test_a_broken_loop_checks_clean_when_it_is_patched(
    pitfall: str, matrix: ModuleType, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    script = Path(shutil.copy(LOOPS / f"{pitfall}_broken.py", tmp_path))
    base, skip = matrix.base_of(script), matrix.options(script).skip
    before = check_script(script, base=base, skip=skip, nursery=nursery, limit=60)
    applied(before.patch.diff, tmp_path)
    after = check_script(script, base=base, skip=skip, nursery=nursery, limit=60)
    assert [finding.pitfall for finding in before.findings] == [pitfall]
    assert before.patch.left == []
    assert [(finding.pitfall, finding.measured) for finding in after.findings] == []


def test_at_least_fifteen_pitfalls_have_a_mechanical_remedy():
    assert set(EDITS) <= set(PITFALLS)
    assert len(EDITS) >= 15


@pytest.mark.parametrize("how", ["git", "patch"])
@pytest.mark.parametrize("inside", ["train.py", "jobs/train.py"])
def test_a_diff_applies_from_the_current_folder(
    how: str, inside: str, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if shutil.which(how) is None:
        pytest.skip(f"{how} is not installed")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / inside
    script.parent.mkdir(exist_ok=True)
    shutil.copy(LOOPS / "double-step_broken.py", script)
    before = script.read_text(encoding="utf-8")
    checked = check_script(inside, nursery=nursery)
    assert script.read_text(encoding="utf-8") == before
    applied(checked.patch.diff, tmp_path, how)
    assert script.read_text(encoding="utf-8") == before.replace("        optimizer.step()\n", "")


def test_what_has_no_mechanical_remedy_is_said(nursery: Nursery):
    checked = check_script(LOOPS / "gradient-mean-of-unequal_broken.py", nursery=nursery)
    assert checked.patch.diff == ""
    (said,) = checked.patch.left
    assert said.startswith("gradient-mean-of-unequal (")
    assert PITFALLS["gradient-mean-of-unequal"].remedy in said


def test_a_script_elsewhere_is_patched_in_its_folder(nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    script = Path(shutil.copy(LOOPS / "double-step_broken.py", tmp_path / "there" / "train.py"))
    checked = check_script("../there/train.py", nursery=nursery)
    assert checked.patch.left == [f"{script} is not in the current folder: apply its part in {script.parent}"]
    applied(checked.patch.diff, tmp_path / "there")
    assert script.read_text(encoding="utf-8").count("step(") == 1


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stem", ["accumulation-tail", "lr-not-scaled", "padded-evaluation"])
def test_an_edit_at_any_line_is_made_whole_or_refused(stem: str, matrix: ModuleType, nursery: Nursery):
    script = LOOPS / f"{stem}_broken.py"
    checked = check_script(script, base=matrix.base_of(script), nursery=nursery, limit=60)
    case = Case(checked.stories, Base(0.1, 8, 4, 1e-4))
    source = Source(str(script), script.read_text(encoding="utf-8"))
    made = set()
    for pitfall, edit in EDITS.items():
        finding = found(pitfall, measured="velocity of a DistributedSampler multiplied by 4", expected="", where=None)
        for line in range(1, len(source.lines) + 1):
            changes = Changes(source)
            try:
                edit(Fix(finding, case, source, line, changes))
            except UnsureError:
                continue
            ast.parse(changes.text())
            made.add(pitfall)
    assert len(made) >= 6


def test_an_edit_that_fails_is_said_and_the_findings_stay(monkeypatch: pytest.MonkeyPatch, nursery: Nursery):
    monkeypatch.setitem(EDITS, "double-step", lambda fix: fix.source.lines[10**9])
    checked = check_script(LOOPS / "double-step_broken.py", nursery=nursery)
    assert [finding.pitfall for finding in checked.findings] == ["double-step"]
    assert checked.patch.diff == ""
    (said,) = checked.patch.left
    assert "the edit failed, IndexError" in said


def test_the_command_prints_the_diff_alone_and_the_rest_on_stderr(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    monkeypatch.setattr(runner, "check_script", partial(check_script, nursery=nursery))
    monkeypatch.chdir(tmp_path)
    text = (LOOPS / "decay-on-batchnorm_broken.py").read_text(encoding="utf-8").replace("shuffle=True", "sampler=ORDER")
    (tmp_path / "train.py").write_text(text.replace("loader =", "ORDER = list(range(256))\nloader ="), encoding="utf-8")
    assert main(["check", "train.py", "--patch"]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("--- ./train.py\n+++ ./train.py\n@@ ")
    assert "+import onehour\n" in said.out
    (line,) = said.err.splitlines()
    assert line.startswith("not in the patch: same-order-every-epoch (train.py:")
    assert "parameter_groups" not in (tmp_path / "train.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a(); b()\n", 1, "line 1 holds several statements"),
        ("if a: b()\n", 1, "line 1 holds several statements"),
        ("if a:\n    b()\n", 2, "line 2 is all that its block has"),
        ("if a:\n    pass\n", 1, "line 1 holds no simple statement"),
    ],
)
def test_a_statement_is_only_deleted_where_it_stands_alone(text: str, line: int, message: str):
    source = Source("t.py", text)
    with pytest.raises(UnsureError, match=message):
        Changes(source).delete(source.at(line))


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("f(a)", "1", "f(a, b=1)"),
        ("f()", "1", "f(b=1)"),
        ("f(\n    a,\n    c=2,\n)", "1", "f(\n    a,\n    c=2, b=1\n)"),
        ("f(b=2, a=3)", None, "f(a=3)"),
        ("f(a, b=2)", None, "f(a)"),
        ("f(b=2)", None, "f()"),
        ("f('é', b=2)  # ü", "3", "f('é', b=3)  # ü"),
        ("f(\n    a,\n    b=2,\n)", None, "f(\n    a,\n)"),
    ],
)
def test_an_argument_is_set_added_and_removed(text: str, value: str | None, expected: str):
    source = Source("t.py", text)
    changes = Changes(source)
    changes.keyword(source.call(1, "f"), "b", value)
    assert changes.text() == expected
    ast.parse(expected)


def test_an_argument_that_may_be_unpacked_is_not_added():
    source = Source("t.py", "f(a, **options)\n")
    with pytest.raises(UnsureError, match="unpacks"):
        Changes(source).keyword(source.call(1, "f"), "b", "1")


def test_windows_line_ends_and_a_missing_last_one_stay():
    source = Source("t.py", "a = 1\r\nif a:\r\n    b = 2")
    changes = Changes(source)
    changes.insert_after(source.at(3), "c = 3")
    changes.insert_before(source.at(1), "d = 4")
    assert changes.text() == "d = 4\r\na = 1\r\nif a:\r\n    b = 2\r\n    c = 3"


@given(st.lists(st.sampled_from(["a = 1", "b = f(2)", "\f", "# é\u2028x", "", "'''\n\u2028'''"])))
def test_lines_are_those_of_the_syntax_tree(parts: list[str]):
    text = "\n".join(parts)
    source = Source("t.py", text)
    assert "".join(lines_of(text)) == text
    for node in source.every(ast.stmt):
        assert source.segment(node) == ast.get_source_segment(text, node)


def test_edits_of_one_place_do_not_mix():
    assert overlap([(0, 5, "a")], [(4, 6, "")])
    assert not overlap([(0, 5, "")], [(0, 5, "")])  # the same one
    assert not overlap([(5, 5, "a")], [(5, 5, "b")])

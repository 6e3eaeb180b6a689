"""The list of public scripts, and how benchmarks/public_scripts.py counts; the scripts themselves are not run here."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import public_scripts
from public_scripts import Script

LISTED = public_scripts.scripts()


def test_twenty_scripts_with_four_faults_each():
    assert len(LISTED) >= 20
    assert len({script.name for script in LISTED}) == len(LISTED)
    for script in LISTED:
        assert re.fullmatch("[0-9a-f]{40}", script.commit), script.name
        assert len({fault["id"] for fault in script.faults}) == 4, script.name
        assert {kind for kind, _ in script.data} <= public_scripts.DATA.keys()


@pytest.fixture
def checkouts(tmp_path: Path) -> tuple[Path, str]:
    """A folder with one repository of one script, and its commit."""
    repository = tmp_path / "someone+loops"
    (repository / "src").mkdir(parents=True)
    (repository / "src" / "train.py").write_text("optimizer.zero_grad()\noptimizer.step()\n")
    (repository / "large.bin").write_text("not needed")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    return tmp_path, commit


def test_a_fault_is_found_if_it_is_new_and_a_finding_that_is_not_listed_is_a_false_alarm(
    checkouts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folder, commit = checkouts
    faults = [
        {"id": "step-without-zero-grad", "find": r"^optimizer\.zero_grad\(\)\n", "write": ""},
        {"id": "double-step", "find": r"^optimizer\.step\(\)", "write": r"\g<0>\n\g<0>"},
        {"id": "no-warmup", "find": "step", "write": "step"},
    ]
    right = {"no-warmup": "as it is"}
    script = Script("someone/loops", commit, "src/train.py", faults, parts=["src"], right=right)
    texts = list[str]()

    def checked(script: Script, tree: Path, *rest: Any) -> dict[str, Any]:
        assert not (tree / "large.bin").exists()
        texts.append((tree / script.path).read_text())
        said = ["no-warmup", "decay-in-loss", *["step-without-zero-grad"] * ("zero_grad" not in texts[-1])]
        findings = [{"id": one, "measured": "", "where": "src/train.py:1"} for one in said]
        return {"error": None, "findings": findings, "notes": [], "seconds": 1.0}

    monkeypatch.setattr(public_scripts, "checked", checked)
    monkeypatch.setattr(public_scripts, "LINES", tmp_path / "runs" / "public.jsonl")
    with pytest.raises(public_scripts.NotKnownError):
        public_scripts.judged(script, folder, None, originals=False)
    public_scripts.judged(script, folder, object(), originals=False)  # pyright: ignore[reportArgumentType]
    row = public_scripts.judged(script, folder, None, originals=False)  # now all is known
    assert texts == [
        "optimizer.zero_grad()\noptimizer.step()\n",
        "optimizer.step()\n",
        "optimizer.zero_grad()\noptimizer.step()\noptimizer.step()\n",
        "optimizer.zero_grad()\noptimizer.step()\n",
    ]
    assert row["false_alarms"] == ["decay-in-loss"]
    assert [fault["found"] for fault in row["faults"]] == [True, False, False]
    assert public_scripts.summary([row])["found"] == 1


def test_an_edit_that_finds_nothing_is_no_edit(tmp_path: Path):
    path = tmp_path / "train.py"
    path.write_text("loss.backward()\n")
    with pytest.raises(AssertionError, match="finds nothing"):
        public_scripts.edit(path, "loss.mean", "loss")
    assert public_scripts.edit(path, r"loss\.", "(2 * loss).") == "loss.backward()\n"
    assert path.read_text() == "(2 * loss).backward()\n"

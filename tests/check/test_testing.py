"""A script that must be clean, in a test suite."""

from functools import partial
from pathlib import Path

import pytest

import onehour.check as check
from onehour.check.run import checking
from onehour.check.run.forkserver import ForkServer

LOOPS = Path(__file__).parent / "loops"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch, forkserver: ForkServer) -> None:
    """Without waiting for torch each time."""
    monkeypatch.setattr(checking, "check_script", partial(check.check_script, forkserver=forkserver))


def test_a_clean_script_passes():
    check.assert_clean(LOOPS / "lr-not-scaled_fixed.py", base_lr=0.1, base_minibatch=16)


def test_a_script_with_a_finding_fails_with_its_table():
    with pytest.raises(AssertionError, match=r"(?s)1 finding\(s\) in .*lr-not-scaled.*target rate 0.1 at minibatch 64"):
        check.assert_clean(LOOPS / "lr-not-scaled_broken.py", base_lr=0.1, base_minibatch=16)


def test_a_script_that_cannot_be_run_is_no_clean_one(tmp_path: Path):
    (tmp_path / "train.py").write_text("raise SystemExit(3)")
    with pytest.raises(check.CheckError, match=r"train\.py:1: the script left with exit code 3"):
        check.assert_clean(tmp_path / "train.py")

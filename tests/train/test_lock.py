"""Two processes never write one folder, and the lock of a killed one is nobody's."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from onehour.train import lock
from onehour.train.lock import FolderLock
from onehour.train.record import move_aside

HOLD = "import sys, time; from pathlib import Path; from onehour.train.lock import FolderLock;"
HOLD += "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path):
    process = holder(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"is being written by another process \(process {process.pid} on"):
            FolderLock(tmp_path, patience=0.2)
    finally:
        process.kill()
        process.communicate()


def test_a_killed_holder_lets_go(tmp_path: Path):
    process = holder(tmp_path)
    started = time.monotonic()
    process.kill()
    FolderLock(tmp_path).release()
    assert time.monotonic() - started < 5
    process.communicate()


def test_a_folder_that_is_being_written_is_not_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its process would go on writing under the name that the new run has then: two writers."""
    monkeypatch.setattr(lock.FolderLock.__init__, "__kwdefaults__", {"patience": 0.2})
    folder = tmp_path / "run"
    folder.mkdir()
    process = holder(folder)
    try:
        with pytest.raises(ValueError, match="is being written by another process"):
            move_aside(folder)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    finally:
        process.kill()
        process.communicate()
    assert move_aside(folder) == tmp_path / "run.1"

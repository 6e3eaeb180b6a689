"""Two processes never write one folder, and the lock of a killed one is nobody's."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from onehour import Recipe, lock
from onehour.lock import HeldFolder
from onehour.train.record import Recorder, move_aside

HOLD = "import sys, time; from pathlib import Path; from onehour.lock import HeldFolder;"
HOLD += "lock = HeldFolder(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
TRY = "import sys; from pathlib import Path; from onehour.lock import HeldFolder;"
TRY += "HeldFolder(Path(sys.argv[1]), patience=0.2)"


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path):
    process = holder(tmp_path)
    try:
        with pytest.raises(ValueError, match=rf"is being written by another process \(process {process.pid} on"):
            HeldFolder(tmp_path, patience=0.2)
    finally:
        process.kill()
        process.communicate()


def test_a_killed_holder_lets_go(tmp_path: Path):
    process = holder(tmp_path)
    started = time.monotonic()
    process.kill()
    HeldFolder(tmp_path).release()
    assert time.monotonic() - started < 5
    process.communicate()


def test_a_folder_that_was_moved_aside_while_its_lock_was_waited_for_is_locked_under_its_name(tmp_path: Path):
    """The file that was opened first is another folder's then."""
    folder = tmp_path / "run"
    process = holder(folder)
    locks: list[HeldFolder] = []
    waiting = threading.Thread(target=lambda: locks.append(HeldFolder(folder)))
    try:
        waiting.start()
        time.sleep(0.3)
        folder.rename(tmp_path / "run.1")
    finally:
        process.kill()
        process.communicate()
    waiting.join(30)
    started = subprocess.run([sys.executable, "-c", TRY, str(folder)], stderr=subprocess.PIPE, text=True)
    assert f"is being written by another process (process {os.getpid()} on" in started.stderr
    locks[0].release()


def test_a_file_system_without_locks_is_one_message_and_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuses(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.fcntl", refuses)
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"\.lock cannot be locked: No locks available; give --out on a file system that"
    ):
        HeldFolder(tmp_path)
    assert time.monotonic() - started < 5


def test_a_folder_that_became_another_recipes_while_its_lock_was_waited_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def waited(folder: Path) -> HeldFolder:
        monkeypatch.undo()
        Recorder(folder, Recipe(seed=1)).close()
        return HeldFolder(folder)

    monkeypatch.setattr("onehour.train.record.HeldFolder", waited)
    with pytest.raises(ValueError, match=r"another recipe \(seed: 1 → 0\)"):
        Recorder(tmp_path, Recipe())
    assert Recipe.from_toml(tmp_path / "recipe.toml").seed == 1
    process = holder(tmp_path)  # the lock was let go
    process.kill()
    process.communicate()


def test_a_folder_that_is_being_written_is_not_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its process would go on writing under the name that the new run has then: two writers."""
    monkeypatch.setattr(lock.HeldFolder.__init__, "__kwdefaults__", {"patience": 0.2})
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

"""A process without progress is noticed, named, and ended; one that works, or goes on after a stop, is left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onehour.train.watchdog import BEAT, BEATS, EXIT_STUCK, Watchdog

LOOP = """
import sys, time
from pathlib import Path
from onehour.train.watchdog import Watchdog
folder, steps, pause, then = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
dog = Watchdog(folder, rank=0, size=2, timeout=1.0)
print("started", flush=True)
for step in range(1, steps + 1):
    time.sleep(pause)
    dog.beat(step)
if then == "hang":
    time.sleep(60)
if then == "evaluate":
    with dog.slow():
        time.sleep(2.5)
dog.close()
"""


def loop(folder: Path, steps: int, pause: float, then: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOOP, str(folder), str(steps), str(pause), then]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def test_a_stuck_process_says_where_and_ends(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / BEATS).write_bytes(bytes(BEAT.size) + BEAT.pack(ended.pid, 2, time.time()))
    process = loop(tmp_path, 3, 0.1, "hang")
    _, said = process.communicate(timeout=30)
    assert process.returncode == EXIT_STUCK
    assert "process 0 made no progress for" in said
    assert "after iteration 3" in said
    assert f"process 1 (id {ended.pid}, is gone) did iteration 2" in said
    assert "most recent call first" in said  # the stacks
    assert 'File "<string>", line 12' in said


@pytest.mark.parametrize("then", ["nothing", "evaluate"])
def test_a_slow_evaluation_and_steady_steps_are_progress(tmp_path: Path, then: str):
    process = loop(tmp_path, 8, 0.4, then)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


def test_a_process_that_was_stopped_goes_on(tmp_path: Path):
    process = loop(tmp_path, 10, 0.3, "nothing")
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_without_a_timeout_nothing_watches_and_nothing_is_written(tmp_path: Path):
    dog = Watchdog(tmp_path, rank=0, size=1, timeout=None)
    dog.beat(1)
    dog.close()
    assert list(tmp_path.iterdir()) == []

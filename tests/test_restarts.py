"""A failed or stuck process is started anew by itself, and ends where an undisturbed run ends; a stop is not undone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FLAGS = ["digits", "--minibatch", "128", "--epochs", "2", "--warmup-epochs", "1", "--processes", "2", "--threads", "1"]


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "onehour", "train", *FLAGS, "--device", "cpu", "--out", str(folder), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def after_an_epoch(folder: Path) -> None:
    for _ in range(600):
        path = folder / "metrics.jsonl"
        if path.exists() and len(path.read_text().splitlines()) > 1:
            return
        time.sleep(0.05)
    raise AssertionError("no epoch in 30 s")


def worker(launcher: int) -> int:
    found = subprocess.run(["pgrep", "-P", str(launcher), "-f", "onehour train"], capture_output=True, text=True)
    return int(found.stdout.split()[-1])


def state(folder: Path) -> str:
    return json.loads((folder / "summary.json").read_text())["state_sha256"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = start(folder)
    process.communicate(timeout=300)
    assert process.returncode == 0
    return state(folder)


@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_fails_or_hangs_is_started_anew(tmp_path: Path, undisturbed: str, what: signal.Signals):
    folder = tmp_path / "run"
    process = start(folder, "--restarts", "1", "--hang-timeout", "4")
    after_an_epoch(folder)
    os.kill(worker(process.pid), what)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert state(folder) == undisturbed
    assert ("is stopped) did iteration" in said) == (what == signal.SIGSTOP)


@pytest.mark.parametrize("what", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
@pytest.mark.parametrize("whom", ["launcher", "process"])
def test_a_signal_saves_and_stops_and_no_restart_undoes_it(
    tmp_path: Path, undisturbed: str, what: signal.Signals, whom: str
):
    folder = tmp_path / "run"
    process = start(folder, "--restarts", "2")
    after_an_epoch(folder)
    os.kill(process.pid if whom == "launcher" else worker(process.pid), what)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 75, said
    assert "and saved; the same command goes on from there" in said.splitlines()[-1]
    process = start(folder)
    process.communicate(timeout=300)
    assert process.returncode == 0
    assert state(folder) == undisturbed

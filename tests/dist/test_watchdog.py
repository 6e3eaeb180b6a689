"""A process without progress is noticed, named, and ended; one that works, or goes on after a stop, is left alone."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from onehour.cli import make_parser
from onehour.cli.train import execution_of
from onehour.dist.watchdog import BEAT, BEATS, EXIT_STUCK, HOST, Watchdog
from onehour.execution import Execution

pytestmark = pytest.mark.usefixtures("forked")

LOOP = """
import os, signal, sys, time
from pathlib import Path
from onehour.dist import watchdog
folder, steps, pause, then, rank, grace = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:]
watchdog.GRACE = float(grace)
dog = watchdog.Watchdog(folder, rank=int(rank), size=2, timeout=1.0)
child = 0
if then in ("stuck loader", "stopped loader"):
    child = os.fork()
    if child == 0:
        if then == "stopped loader":
            os.kill(os.getpid(), signal.SIGSTOP)
        def reading_a_file_that_never_comes():
            time.sleep(60)
        reading_a_file_that_never_comes()
print("started", flush=True)
if then == "late":
    time.sleep(2.5)
for step in range(1, steps + 1):
    time.sleep(pause)
    dog.beat(step)
if then in ("hang", "stuck loader", "stopped loader"):
    time.sleep(60)
if then == "evaluate":
    with dog.slow():
        time.sleep(2.5)
if then == "pause":
    time.sleep(2.5)
dog.close()
if child:
    os.kill(child, signal.SIGKILL)
"""


def loop(
    folder: Path, steps: int, pause: float, then: str, rank: int = 0, grace: float = 10.0
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", LOOP, str(folder), str(steps), str(pause), then, str(rank), str(grace)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def test_a_stuck_process_says_where_and_ends(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / BEATS).write_bytes(bytes(BEAT.size) + BEAT.pack(ended.pid, 2, time.time(), 1.0, HOST))
    process = loop(tmp_path, 3, 0.1, "hang")
    _, said = process.communicate(timeout=300)
    assert process.returncode == EXIT_STUCK
    assert "process 0 made no progress for" in said
    assert "after iteration 3" in said
    assert f"process 1 (id {ended.pid}, is gone) did iteration 2" in said
    assert "most recent call first" in said  # the stacks
    assert 'File "<string>"' in said


@pytest.mark.parametrize("how", ["stuck", "stopped"])
def test_a_loader_that_gives_nothing_is_named_and_shows_where_it_is(tmp_path: Path, how: str):
    process = loop(tmp_path, 3, 0.1, f"{how} loader")
    (child,) = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.wait(timeout=300)
    os.kill(int(child), signal.SIGKILL)  # it holds the other end of what is read now
    _, said = process.communicate(timeout=300)
    assert process.returncode == EXIT_STUCK
    assert "after iteration 3" in said
    if how == "stuck":
        stacks = said.partition(f"process id {child} is at")[2]
        assert "reading_a_file_that_never_comes" in stacks
    else:
        assert f"a process that loads data for process 0 (id {child}, is stopped) gives none" in said


@pytest.mark.parametrize("then", ["late", "evaluate"])
def test_the_grace_of_a_start_and_an_evaluation_ends_too(tmp_path: Path, then: str):
    process = loop(tmp_path, 1, 0.1, then, grace=2.0)
    _, said = process.communicate(timeout=300)
    assert process.returncode == EXIT_STUCK
    assert int(said.partition("made no progress for ")[2].split()[0]) >= 2


@pytest.mark.parametrize("alive", [True, False])
def test_others_bear_with_a_process_0_that_waits_for_a_disk_while_it_lives(tmp_path: Path, alive: bool):
    seen = time.time() + (60 if alive else -60)  # however long the process takes to start
    (tmp_path / BEATS).write_bytes(BEAT.pack(os.getpid(), 3, seen, 10.0, HOST))
    process = loop(tmp_path, 3, 0.1, "pause", rank=1)
    _, said = process.communicate(timeout=300)
    assert process.returncode == (0 if alive else EXIT_STUCK)
    assert ("process 0" in said) != alive


def test_a_process_of_another_host_is_named_without_a_guess_about_it(tmp_path: Path):
    (tmp_path / BEATS).write_bytes(bytes(BEAT.size) + BEAT.pack(1, 2, time.time() - 9, 1.0, HOST + 1))
    _, said = loop(tmp_path, 3, 0.1, "hang").communicate(timeout=300)
    assert "process 1 (id 1, of another host) did iteration 2, last seen 1" in said


@pytest.mark.parametrize("then", ["nothing", "evaluate", "late"])
def test_a_slow_start_or_evaluation_and_steady_steps_are_progress(tmp_path: Path, then: str):
    process = loop(tmp_path, 8, 0.4, then)
    assert process.communicate(timeout=300) == ("", "")
    assert process.returncode == 0


def test_a_process_that_was_stopped_goes_on(tmp_path: Path):
    process = loop(tmp_path, 10, 0.3, "nothing")
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=300)
    assert process.returncode == 0


def test_what_is_slow_before_the_first_iteration_does_not_end_the_patience_of_a_start(tmp_path: Path):
    dog = Watchdog(tmp_path, rank=0, size=1, timeout=None)
    patient = dog._patience
    with dog.slow():
        pass
    assert dog._patience == patient > 1
    dog.beat(1)
    with dog.slow():
        assert dog._patience == patient
    assert dog._patience == 1
    dog.beat(2, slow=True)
    with dog.slow():
        pass
    assert dog._patience == patient


def test_its_file_is_closed_at_its_end(tmp_path: Path):
    def is_open() -> bool:
        files = Path("/proc/self/fd").iterdir()
        return any(os.path.realpath(file) == str(tmp_path / BEATS) for file in files)

    with Watchdog(tmp_path, rank=0, size=1, timeout=1.0):
        while not is_open():
            time.sleep(0.01)
    deadline = time.monotonic() + 5
    while is_open() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_open()


def test_without_a_timeout_nothing_watches_and_nothing_is_written(tmp_path: Path):
    dog = Watchdog(tmp_path, rank=0, size=1, timeout=None)
    dog.beat(1)
    dog.close()
    assert list(tmp_path.iterdir()) == []


def test_the_last_resort_is_not_armed_again_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The thread may be about to arm it just when the run ends."""
    said: list[str] = []
    ended = threading.Event()

    def arm(seconds: float, **_: object) -> None:
        if not ended.is_set():
            ended.set()
            dog.close()
            said.append("armed")

    monkeypatch.setattr("onehour.dist.watchdog.faulthandler.dump_traceback_later", arm)
    monkeypatch.setattr(
        "onehour.dist.watchdog.faulthandler.cancel_dump_traceback_later", lambda: said.append("cancelled")
    )
    dog = Watchdog(tmp_path, rank=0, size=1, timeout=0.5)
    assert ended.wait(300)
    for thread in [thread for thread in threading.enumerate() if thread.name == "watchdog"]:
        thread.join(300)
    assert said == ["cancelled", "armed", "cancelled"]


def test_a_message_that_cannot_be_written_keeps_no_process_from_its_end(tmp_path: Path):
    command = [sys.executable, "-c", LOOP, str(tmp_path), "3", "0.1", "hang", "0", "10.0"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=full, timeout=300)
    assert done.returncode == EXIT_STUCK


SLEEPS = "import time\ndef data(): time.sleep(600)\ndef net(): time.sleep(600)\n"


@pytest.mark.parametrize(
    "arguments", [["--data", "sleeps:data"], ["--data", "sleeps:data", "--processes", "2"], ["--model", "sleeps:net"]]
)
def test_a_start_that_does_not_end_is_ended_and_shown(tmp_path: Path, arguments: list[str]):
    (tmp_path / "sleeps.py").write_text(SLEEPS)
    command = [sys.executable, "-m", "onehour", "train", "digits", *arguments, "--hang-timeout", "0.5"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert ended.returncode == EXIT_STUCK
    assert "process 0 made no progress for " in ended.stderr
    assert " s while it started" in ended.stderr
    assert 'sleeps.py", line' in ended.stderr


def test_python_and_the_command_line_watch_alike():
    parsed = make_parser().parse_args(["train", "digits"])
    assert execution_of(parsed).hang_timeout == Execution().hang_timeout == 120.0

"""Work in other processes: what comes back, progress, every way in which nothing does, and how a person stops it."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from onehour.data.dataset import FaultError
from onehour.data.processes import in_child, spans, spread

Done = Callable[[int], None]


def square(task: int, done: Done) -> int:
    for _ in range(task):
        done(1)
    return task * task


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_results_come_in_the_order_of_tasks_and_progress_adds_up(jobs: int):
    told: list[int] = []
    assert spread(square, [3, 1, 2, 5], jobs=jobs, done=told.append) == [9, 1, 4, 25]
    assert sum(told) == 11
    assert spread(square, [], jobs=jobs) == []
    assert [index for span in spans(10, 3) for index in span] == list(range(10))
    assert spans(0, 3) == []


def refusing(task: int, done: Done) -> int:
    if task == 2:
        raise ValueError("two is wrong")
    return task


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_one_is_the_error_of_all(jobs: int):
    with pytest.raises(ValueError, match=r"^two is wrong$"):
        spread(refusing, [1, 2, 3], jobs=jobs)


def dying(task: int, done: Done) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_process_that_is_killed_is_one_message():
    said = "one of 2 processes was ended from outside, perhaps for lack of memory; use fewer"
    with pytest.raises(ValueError, match=said):
        spread(dying, [1, 2, 3], jobs=2)


def slow(seconds: float, task: int, done: Done) -> int:
    for _ in range(1000):
        time.sleep(seconds / 1000)
        done(1)
    return task


def test_an_interrupt_ends_every_process_soon():
    def interrupt(items: int) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        spread(partial(slow, 60.0), [1, 2, 3, 4], jobs=2, done=interrupt)
    assert time.monotonic() - started < 60


def test_processes_end_with_one_that_is_killed():
    here, there = os.pipe()

    def work(task: int, done: Done) -> None:
        os.write(there, b"%d\n" % os.getpid())
        time.sleep(60)

    if (parent := os.fork()) == 0:
        try:
            os.close(here)
            spread(work, [1, 2], jobs=2)
        finally:
            os._exit(0)
    os.close(there)
    with os.fdopen(here) as said:
        pids = [int(said.readline()) for _ in range(2)]
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        assert said.read() == ""  # ends when the last of them has ended
    assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in pids)


def children() -> set[int]:
    """Processes that this one has started and not waited for."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


class Kept:
    """What opens something when it is first asked."""

    file: object = None

    def ask(self) -> str:
        self.file = open(__file__, "rb")  # noqa: SIM115 - as people's data sets do
        return f"{self.file.read(3)}"


def test_what_it_returns_comes_back_and_nothing_that_it_did_stays():
    kept, before, state = Kept(), set(os.listdir("/proc/self/fd")), torch.get_rng_state()

    def look() -> tuple[str, float]:
        return kept.ask(), float(torch.rand(()))

    assert in_child(look, "a look")[0] == 'b\'"""\''
    assert in_child(lambda: bytes(5_000_000), "a look") == bytes(5_000_000)
    assert kept.file is None
    assert set(os.listdir("/proc/self/fd")) == before
    assert torch.equal(torch.get_rng_state(), state)


def raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (raises(ValueError("as it is")), "^as it is$"),
        (raises(OSError(2, "No such file")), r"^a look failed: FileNotFoundError: .*No such file \(.*test_processes"),
        (raises(MemoryError()), "^a look failed: MemoryError"),
        (raises(SystemExit(3)), "^a look failed: SystemExit: 3"),
        (raises(KeyboardInterrupt()), "^a look failed: KeyboardInterrupt"),
        (lambda: threading.Lock(), "^a look failed: TypeError: cannot pickle"),
        (lambda: os._exit(5), "^a look failed: its process exited with code 5$"),
        (lambda: os._exit(0), "^a look failed: its process exited with code 0$"),
        (
            lambda: (faulthandler.disable(), os.kill(os.getpid(), signal.SIGSEGV)),
            r"^a look failed: its process was killed \(SIGSEGV\)$",
        ),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"was killed \(SIGKILL\); is there enough memory\?$"),
    ],
)
def test_every_way_to_fail_is_one_message(work: Callable[[], object], words: str):
    before = children()
    with pytest.raises(ValueError, match=words):
        in_child(work, "a look")
    assert children() == before, "and nobody is left"


class OwnError(ValueError):
    """What cannot be made again from its text."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_a_fault_comes_as_itself_and_an_error_that_cannot_travel_as_its_text():
    with pytest.raises(FaultError, match=r"^a\.jpg is empty; replace it$"):
        in_child(raises(FaultError("a.jpg", "is empty", "replace it")), "a look")
    with pytest.raises(ValueError, match=r"^1 and 2$"):
        in_child(raises(OwnError(1, 2)), "a look")


def test_one_that_is_stuck_is_killed_when_patience_ends():
    before, lock = children(), threading.Lock()
    said = r"^a look has not ended after 0\.3 s: .* that no thread that ran before holds a lock$"
    with lock, pytest.raises(ValueError, match=said):
        in_child(lambda: lock.acquire(), "a look", patience=0.3)
    assert children() == before


@pytest.mark.parametrize("answers", [True, False])
def test_what_it_starts_and_leaves_behind_keeps_nobody(answers: bool):
    """A program in the background holds the pipe's other end open."""

    def work() -> str:
        subprocess.Popen(["sleep", "20"], close_fds=False)
        if os.fork() == 0:
            time.sleep(20)
        if not answers:
            os._exit(4)
        return "done"

    if answers:
        assert in_child(work, "a look", patience=10) == "done"
    else:
        with pytest.raises(ValueError, match="exited with code 4"):
            in_child(work, "a look", patience=10)


@pytest.mark.usefixtures("forked")
def test_what_it_prints_is_printed_once_and_so_is_what_waited_before():
    code = (
        "from onehour.data.processes import in_child\n"
        "print('before')\n"
        "in_child(lambda: print('within'), 'a look')\n"
        "print('behind')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("before\nwithin\nbehind\n", "")


def test_a_process_that_cannot_be_forked_is_a_message(monkeypatch: pytest.MonkeyPatch):
    def refuses() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuses)
    with pytest.raises(ValueError, match=r"^no process can be started for a look: Resource temporarily unavailable$"):
        in_child(lambda: 1, "a look")


def test_a_caller_that_ignores_its_children_gets_the_answer_too():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert in_child(lambda: 1, "a look") == 1
        with pytest.raises(ValueError, match=r"^a look failed: its process exited"):
            in_child(lambda: os._exit(3), "a look")
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("forked")
def test_ctrl_c_ends_both():
    code = (
        "import os, time\n"
        "from onehour.data.processes import in_child\n"
        "def look():\n"
        # Python takes a Ctrl-C that comes while it forks for an error of whoever asked to be told of forks.
        "    while open(f'/proc/{os.getppid()}/stat').read().rpartition(')')[2].split()[0] != 'S': time.sleep(0.01)\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "in_child(look, 'a look')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT
    assert not os.path.exists(f"/proc/{child}")

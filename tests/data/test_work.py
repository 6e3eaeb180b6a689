"""Work in several processes: the same results, progress of all, and an end whatever happens."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial

import pytest

from onehour.data.work import spans, spread

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
    with pytest.raises(
        ValueError, match="one of 2 processes was ended from outside, perhaps for want of memory; use fewer"
    ):
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
    assert time.monotonic() - started < 20


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


def test_every_item_is_in_one_span():
    assert [index for span in spans(10, 3) for index in span] == list(range(10))
    assert spans(0, 3) == []

"""Tasks spread over processes: one for each core, or for each GPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from typing import Any

from onehour.dist.signals import STOPS, ignore_stops
from onehour.execution import Execution
from onehour.files import open_inside
from onehour.leaving import signals_wait
from onehour.lock import HeldFolder
from onehour.messages import escape_output
from onehour.sweeps.task import Task, run_task

TICK = 0.5
SAFE_PATH = "PYTHONSAFEPATH"
"""With it a process is started here, lest Python take a json.py of the current folder for its own."""


@dataclass(frozen=True)
class Event:
    """A task that has ended, or none: a moment to look at the clock."""

    task: Task | None = None
    alone: str | None = None  # why its seeds were trained one by one; None where they were one network

    running: tuple[Task, ...] = ()


def run_tasks(
    tasks: Sequence[Task], *, places: Sequence[dict[str, str]], execution: Execution, held: HeldFolder
) -> Iterator[Event]:
    """Train the tasks, the next one wherever a process is free: an event for each that has ended, and others between.

    Every process holds the sweep's folder until it has ended, whoever is killed. A ValueError for bad input in a task,
    or a process that was killed: what has ended stays. A FolderLostError if the folder was moved or removed.

    Args:
        places: the environment of each process.
    """
    context = multiprocessing.get_context("spawn")
    waiting = deque(tasks)
    workers: list[_Worker] = []
    try:
        own = {SAFE_PATH: os.environ[SAFE_PATH]} if SAFE_PATH in os.environ else {}
        for number, environ in enumerate(places[: len(tasks)]):
            log = open_inside(held.descriptor, f"log-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            workers.append(_Worker(context, (os.getpid(), held, DupFd(log), environ | own, execution)))
            os.close(log)
            workers[-1].give(waiting.popleft())
        while busy := [worker for worker in workers if worker.task is not None]:
            ready = wait([worker.connection for worker in busy], timeout=TICK)
            held.check()  # a process that has noticed knows of its own run alone
            ended = [worker for worker in busy if worker.connection in ready]
            for worker in ended or [None]:
                task, alone = worker.take() if worker else (None, None)
                yield Event(task, alone, tuple(worker.task for worker in workers if worker.task is not None))
                if worker and waiting:
                    held.check()  # whoever was told may have taken the folder away
                    worker.give(waiting.popleft())
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    def __init__(self, context: Any, arguments: tuple[Any, ...]) -> None:
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=work, args=(theirs, *arguments))
        with _only_own_modules():
            resource_tracker.ensure_running()  # which would let every signal in again
        # A terminal's Ctrl-C reaches it before it can ignore it.
        with _only_own_modules(), signals_wait(*{*STOPS} - {signal.SIGTERM}):
            self.process.start()
        theirs.close()
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        self.connection.send(task)

    def take(self) -> tuple[Task, str | None]:
        assert self.task is not None
        task, self.task = self.task, None
        names = ", ".join(folder.name for folder in task.folders)
        try:
            kind, text = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise ValueError(
                f"the process that trained {names} ended with code {self.process.exitcode} (its log lies in the"
                " sweep's folder; code -9 is often a lack of memory: use fewer --jobs); the same command goes on"
            ) from error
        if kind != "done":
            raise ValueError(text or f"{names} was stopped")
        return task, text

    def end(self) -> None:
        if self.task is not None:
            self.process.terminate()
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def work(
    connection: Connection, parent: int, held: HeldFolder, log: Any, environ: dict[str, str], execution: Execution
) -> None:
    """Receive tasks and answer each: ("done", why one by one or None), ("refused", message) or ("stopped", "").

    When the parent is gone, what is being trained is saved and this process ends. No task begins but in the folder that
    is held. The log gets what the runs print.
    """
    os.environ.pop(SAFE_PATH, None)  # what the user's code starts is none of ours
    os.environ.update(environ)
    escape_output()
    ignore_stops()  # Ctrl-C reaches the whole group; the parent ends us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the `finally`s of what runs
    os.dup2(log.detach(), sys.stdout.fileno())
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    import torch

    from onehour.training.record import StoppedError

    if execution.threads:
        torch.set_num_threads(execution.threads)
    while os.getppid() == parent:
        try:
            task: Task = connection.recv()
        except EOFError:
            break
        try:
            held.check()
            answer = ("done", run_task(task, execution, lambda: os.getppid() != parent))
        except ValueError as error:
            answer = ("refused", str(error))
        except StoppedError:
            answer = ("stopped", "")
        sys.stdout.flush()
        try:
            connection.send(answer)
        except OSError:  # the parent is gone
            break
    held.release()


@contextmanager
def _only_own_modules() -> Iterator[None]:
    """What is started meanwhile does not look into the current folder for Python's modules."""
    before = os.environ.get(SAFE_PATH)
    os.environ[SAFE_PATH] = "1"
    try:
        yield
    finally:
        del os.environ[SAFE_PATH]
        os.environ |= {SAFE_PATH: before} if before is not None else {}

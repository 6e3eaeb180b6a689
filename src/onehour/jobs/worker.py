"""A process that trains tasks one after another until its parent is gone. Imports torch when it begins."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

from onehour.dist.signals import STOPS, ignore_stops
from onehour.execution import Execution
from onehour.jobs.task import Task, run_task
from onehour.lock import HeldFolder
from onehour.messages import printable

__all__ = ["SAFE_PATH", "work"]

SAFE_PATH = "PYTHONSAFEPATH"
"""With it a process is started here, lest Python take a json.py of the current folder for its own."""


def work(
    connection: Connection, parent: int, held: HeldFolder, log: Any, environ: dict[str, str], execution: Execution
) -> None:
    """Receive tasks and answer each: ("done", why one by one or None), ("refused", message) or ("stopped", "").

    Args:
        parent: the process to work for; when it is gone, what is being trained is saved and this process ends.
        held: the sweep's folder, locked until this process has ended, whoever is killed; no task begins elsewhere.
        log: gets what the runs print.
        environ: of this process, such as its GPU.
    """
    os.environ.pop(SAFE_PATH, None)  # what the user's code starts is none of ours
    os.environ.update(environ)
    printable()
    ignore_stops()  # Ctrl-C reaches the whole group; the parent ends us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the `finally`s of what runs
    os.dup2(log.detach(), sys.stdout.fileno())
    os.dup2(sys.stdout.fileno(), sys.stderr.fileno())
    import torch

    from onehour.training.run import StoppedError

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

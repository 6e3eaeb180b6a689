"""Where the processes of a run find each other: process 0 waits at an address, and who waits says for whom."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from onehour.dist.launched import Launched
from onehour.dist.network import Host, loopback, this_host

__all__ = ["JOIN", "meet"]

JOIN = 600.0
"""Seconds that all processes have to come."""
FIRST, EVERY = 10.0, 30.0
"""Seconds after which one that waits says so, for the first time and from then on."""
ANSWER = 10.0
"""Seconds in which a store answers, and process 0 has told its own that it is there."""
LAUNCHERS = "TORCHELASTIC_USE_AGENT_STORE"
"""Set by launchers that keep the store themselves."""


def meet(place: Launched, *, computes: str = "", limit: float = JOIN) -> tuple[Store, list[Host]]:
    """Wait until all p processes have come; gives the store that they share, and where each of them is.

    Args:
        computes: the name of this process's device, for the others.
        limit: seconds to wait.

    Raises:
        ValueError: on every process, if another program has the port; if two processes have one rank.
        TimeoutError: if some process has not come in time, naming it.

    >>> store, hosts = meet(Launched(rank=0, size=1, address="localhost", port=20005 + os.getpid() % 12763))
    >>> len(hosts)
    1
    """
    launchers = os.environ.get(LAUNCHERS) == str(True)
    wait = _Wait(place, limit)
    store = _reach(place, wait) if launchers or place.rank else _serve(place)
    store.set_timeout(timedelta(seconds=limit))
    names = PrefixStore("onehour", store)
    if not launchers and place.rank:
        _refuse_another_runs(place, names)
    if names.add(f"claims of {place.rank}", 1) > 1 and not launchers:
        raise ValueError(
            f"two processes have come to {place.meeting} as process {place.rank} of {place.size}; each needs a RANK of"
            " its own, and each run an address of its own (MASTER_ADDR, MASTER_PORT)"
        )
    about = dataclasses.asdict(this_host(place)) | {"computes": computes, "size": place.size}
    names.set(f"process {place.rank}", json.dumps(about))
    names.add("came", 1)
    while names.add("came", 0) < place.size:
        wait.turn(lambda: _missing(place, names))
    found = [json.loads(names.get(f"process {rank}")) for rank in range(place.size)]
    return PrefixStore("group", store), [
        Host(each["name"], each["machine"], each["address"], each["computes"]) for each in found
    ]


class _Wait:
    """One wait for the others, over all that it needs: says what it waits for, and ends."""

    def __init__(self, place: Launched, limit: float) -> None:
        self._place, self._limit = place, limit
        self._began = time.monotonic()
        self._next = FIRST
        self._pause = 0.01

    def turn(self, what: Callable[[], str]) -> None:
        """Pause for a moment; now and then say `what()`, which is "" where another process says it."""
        waited = time.monotonic() - self._began
        if waited > self._limit:
            who = f"process {self._place.rank} on {socket.gethostname()}"
            raise TimeoutError(
                f"{who} waited {self._limit:g} s for {what() or 'the others'}, and cannot go on; {_LOOK}"
            )
        if waited > self._next:
            self._next += EVERY
            if text := what():
                line = f"onehour: waiting for {text}, for {waited:.0f} s so far; {_LOOK}"
                with suppress(OSError):
                    print(line, file=sys.stderr, flush=True)
        self._pause = min(1.5 * self._pause, 0.5)
        time.sleep(self._pause)


_LOOK = "look whether each was started and what it says, and whether its host reaches that address"


def _missing(place: Launched, names: Store) -> str:
    """Who has not come; "" where a process of a lower rank has, and says it."""
    if any(names.check([f"process {rank}"]) for rank in range(place.rank)):
        return ""
    gone = [rank for rank in range(place.size) if not names.check([f"process {rank}"])]
    listed = ", ".join(map(str, gone[:8])) + (" …" if len(gone) > 8 else "")
    return f"{len(gone)} of {place.size} processes ({listed}) to meet at {place.meeting}"


def _taken(place: Launched, why: str) -> ValueError:
    return ValueError(
        f"port {place.port} of {place.address}, where the processes of this run are to meet, {why}; set MASTER_PORT to"
        " a free one, the same on every process"
    )


def _serve(place: Launched) -> Store:
    """Process 0's store, at which the others arrive."""
    try:
        listener = _listener(place.port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise _taken(place, "is used by another program" if taken else f"cannot be used ({error.strerror})") from error
    return TCPStore(loopback(), place.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _listener(port: int) -> socket.socket:
    """A socket that takes connections to all of this host's addresses."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise
    return socket.create_server(("", port), backlog=4096)


def _reach(place: Launched, wait: _Wait) -> Store:
    """Connect to the store, which may not be there yet."""
    failures = 0
    while failures < 2:
        try:
            socket.create_connection((place.address, place.port), timeout=5.0).close()
        except OSError as error:
            wait.turn(partial(_tries, place, error.strerror or str(error)))
            continue
        if (store := _connected(place)) is not None:
            return store
        failures += 1
    raise _taken(place, "is used by another program (or process 0 does not answer)")


def _connected(place: Launched) -> Store | None:
    """The store at an address where something listens; None if that is no store."""
    found: list[Store] = []

    def connect() -> None:
        with suppress(RuntimeError):
            found.append(
                TCPStore(
                    place.address,
                    place.port,
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=ANSWER),
                )
            )

    # In a thread, since torch waits for ever for one that listens and says nothing.
    thread = threading.Thread(target=connect, name="store", daemon=True)
    with _without_torchs_traces():
        thread.start()
        thread.join(1.5 * ANSWER)
    return found[0] if found else None


def _tries(place: Launched, failed: str) -> str:
    """What one process of a host says for all of it."""
    if place.local_rank:
        return ""
    own = f"process {place.rank} on {socket.gethostname()}"
    return f"process 0 of {place.size}: {own} tries {place.meeting} ({failed})"


def _refuse_another_runs(place: Launched, names: Store) -> None:
    """A store without a process 0 of ours, or with one of another p, is not this run's."""
    deadline = time.monotonic() + ANSWER
    while not names.check(["process 0"]):
        if time.monotonic() > deadline:
            raise _taken(place, "is used by another program")
        time.sleep(0.05)
    size = json.loads(names.get("process 0"))["size"]
    if size != place.size:
        raise ValueError(
            f"WORLD_SIZE is {place.size} on process {place.rank}, but {size} on process 0 at {place.meeting}; it must"
            " be the same on all, and each run needs an address of its own (MASTER_ADDR, MASTER_PORT)"
        )


@contextmanager
def _without_torchs_traces() -> Iterator[None]:
    """While entered, nothing reaches the error output: of another program's answer torch writes pages."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

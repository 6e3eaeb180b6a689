"""Where the processes of a run find each other: process 0 waits at an address, and who waits says for whom.

And over which addresses and devices of this host they then reach each other.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onehour.dist.launched import LOOPBACK, Launched
from onehour.messages import stderr_muted, tell

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

JOIN = 600.0
"""Seconds that all processes have to come."""
FIRST, EVERY = 10.0, 30.0
"""Seconds after which one that waits says so, for the first time and from then on."""
ANSWER = 10.0
"""Seconds in which a store answers, and process 0 has told its own that it is there."""
LAUNCHERS = "TORCHELASTIC_USE_AGENT_STORE"
"""Set by launchers that keep the store themselves."""
GLOO_DEVICE = "GLOO_SOCKET_IFNAME"
LOCAL = ("localhost", LOOPBACK, "::1")
SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Host:
    """Where a process is."""

    name: str
    machine: str  # the same for processes that share a loopback device, and for no others
    address: str  # from which it reaches process 0's host; "" if that is itself
    computes: str = ""  # the device that the process takes: "cpu", or a GPU's own name


def meet(place: Launched, *, computes: str = "", limit: float = JOIN) -> tuple[Store, list[Host]]:
    """Wait until all p processes have come; gives the store that they share, and where each of them is.

    Raises:
        ValueError: on every process, if another program has the port; if two processes have one rank.
        TimeoutError: if some process has not come in time, naming it.
    """
    from torch._C._distributed_c10d import PrefixStore

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
                tell(f"waiting for {text}, for {waited:.0f} s so far; {_LOOK}")
        self._pause = min(1.5 * self._pause, 0.5)
        time.sleep(self._pause)


_LOOK = "check whether each was started and what it says, and whether its host reaches that address"


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
    try:
        return store_at(_listener(place.port))
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise _taken(place, "is used by another program" if taken else f"cannot be used ({error.strerror})") from error


def store_at(listener: socket.socket) -> Store:
    """A store of this process that the others reach at a socket, whose port is taken already."""
    from torch._C._distributed_c10d import TCPStore

    port = listener.getsockname()[1]
    return TCPStore(loopback(), port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _listener(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise
    return socket.create_server(("", port), backlog=4096)


def _reach(place: Launched, wait: _Wait) -> Store:
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
    from torch._C._distributed_c10d import TCPStore

    found: list[Store] = []
    limit = timedelta(seconds=ANSWER)

    def connect() -> None:
        with suppress(RuntimeError):
            found.append(TCPStore(place.address, place.port, is_master=False, wait_for_workers=False, timeout=limit))

    # In a thread, since torch waits for ever for one that listens and says nothing.
    thread = threading.Thread(target=connect, name="store", daemon=True)
    with stderr_muted():  # of another program's answer torch writes pages
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


def _family_of(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def loopback() -> str:
    """The address at which processes of this machine reach each other: 127.0.0.1, or ::1 where that is not there."""
    failed = []
    for address in (LOOPBACK, "::1"):
        try:
            with socket.socket(_family_of(address)) as listener:
                listener.bind((address, 0))
                listener.listen(1)
                with socket.create_connection(listener.getsockname()[:2], timeout=5.0):
                    return address
        except OSError as error:
            failed.append(f"{address} ({error.strerror or error})")
    raise ValueError(
        f"processes of this machine cannot meet: neither {failed[0]} nor {failed[1]} can be bound and reached; look"
        " whether the loopback device lo is up (`ip link set lo up`)"
    )


def listen_here(port: int) -> socket.socket:
    """A socket that takes connections of this machine alone; port 0 stands for a free one."""
    here = loopback()
    return socket.create_server((here, port), family=_family_of(here), backlog=4096)


def this_host(place: Launched) -> Host:
    name = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        machine = f"{boot}:{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        machine = name
    return Host(name, machine, _address_towards(place.address) if place.address else "")


def choose_device(place: Launched, hosts: Sequence[Host]) -> str | None:
    """The network device for Gloo to use; None leaves it to Gloo, which takes the address of this host's name.

    On one machine that is the loopback device. Where this host's name is an address of that device (127.0.1.1 in
    Debian's hosts file), or none, Gloo would tell the other hosts an address at which they find themselves.
    """
    devices = [name for _, name in socket.if_nameindex()]
    asked = os.environ.get(GLOO_DEVICE)
    if asked:
        for name in asked.split(","):
            if name.partition(":")[0] not in devices:  # eth0:1 is another address of eth0
                raise ValueError(
                    f"{GLOO_DEVICE} is {asked!r}, but {socket.gethostname()} has no network device {name}; expected one"
                    f" of {', '.join(devices)}"
                )
        return None
    if place.address in LOCAL or len({host.machine for host in hosts}) == 1:
        return "lo" if "lo" in devices else None
    own = hosts[place.rank]
    found = _addresses(own.name)
    if any(not _is_loopback(address) and _is_here(address) for address in found):
        return None
    reached = own.address
    if not reached:  # process 0 is here, so another host's address shows the way
        others = [host.address for host in hosts if host.machine != own.machine and host.address]
        reached = _address_towards(others[0]) if others else ""
    device = next((name for name in devices if reached and reached in _of_device(name)), None)
    if device is None:
        what = f"is {', '.join(found)}" if found else "has no address"
        raise ValueError(
            f"the name of this host, {own.name}, {what} here, which cannot be bound for other hosts to reach; set"
            f" {GLOO_DEVICE} to the network device towards them ({', '.join(devices)})"
        )
    return device


def _addresses(name: str) -> list[str]:
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_here(address: str) -> bool:
    with suppress(OSError), socket.socket(_family_of(address)) as probe:
        probe.bind((address, 0))
        return True
    return False


def _address_towards(name: str) -> str:
    """This host's address on the way to another host; "" if it is the other itself, or there is no way."""
    for address in _addresses(name):
        if _is_loopback(address) or _is_here(address):
            continue
        with suppress(OSError), socket.socket(_family_of(address), socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            return str(probe.getsockname()[0])
    return ""


def _of_device(name: str) -> list[str]:
    import fcntl

    found = []
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        found.append(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            digits, *_, device = line.split()
            if device == name:
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found

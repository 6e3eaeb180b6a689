"""This host's addresses and devices, as far as processes need them to reach each other."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from onehour.dist.launched import LOOPBACK, Launched

__all__ = ["GLOO_DEVICE", "Host", "choose_device", "family_of", "loopback", "this_host"]

GLOO_DEVICE = "GLOO_SOCKET_IFNAME"
LOCAL = ("localhost", LOOPBACK, "::1")
SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Host:
    """Where a process is.

    Args:
        name: its host's.
        machine: the same for processes that share a loopback device, and for no others.
        address: from which it reaches process 0's host; "" if that is itself.
        computes: the device that the process takes: "cpu", or a GPU's own name.

    >>> Host("gpu07", "1:2", "10.0.0.7").name
    'gpu07'
    """

    name: str
    machine: str
    address: str
    computes: str = ""


def family_of(address: str) -> socket.AddressFamily:
    """Of an address in numbers.

    >>> family_of("::1").name
    'AF_INET6'
    """
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def loopback() -> str:
    """The address at which processes of this machine reach each other: 127.0.0.1, or ::1 where that is not there.

    Raises:
        ValueError: naming what could not be bound, if neither is there.

    >>> loopback()
    '127.0.0.1'
    """
    failed = []
    for address in (LOOPBACK, "::1"):
        try:
            with socket.socket(family_of(address)) as listener:
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


def this_host(place: Launched) -> Host:
    """Where this process is.

    >>> this_host(Launched()).name == socket.gethostname()
    True
    """
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

    Raises:
        ValueError: naming GLOO_SOCKET_IFNAME, if it names no device, or must be set.

    >>> choose_device(Launched(size=2, address="127.0.0.1"), [])
    'lo'
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
    """What a name stands for on this host."""
    try:
        return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(name, None)))
    except OSError:
        return []


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _is_here(address: str) -> bool:
    """Whether an address is one of this host."""
    with suppress(OSError), socket.socket(family_of(address)) as probe:
        probe.bind((address, 0))
        return True
    return False


def _address_towards(name: str) -> str:
    """This host's address on the way to another host; "" if it is the other itself, or there is no way."""
    for address in _addresses(name):
        if _is_loopback(address) or _is_here(address):
            continue
        with (
            suppress(OSError),
            socket.socket(family_of(address), socket.SOCK_DGRAM) as probe,
        ):
            probe.connect((address, 9))  # sends nothing
            return str(probe.getsockname()[0])
    return ""


def _of_device(name: str) -> list[str]:
    """The addresses of a network device."""
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

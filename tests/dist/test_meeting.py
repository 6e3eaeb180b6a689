"""How processes find each other, each in a process of its own, and what they say while they wait.

And which address and device they reach each other by; for real in network namespaces, in campaigns/cluster.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest

from onehour.dist import meeting
from onehour.dist.launched import Launched
from onehour.dist.meeting import GLOO_DEVICE, Host, choose_device, loopback, this_host

pytestmark = pytest.mark.usefixtures("forked")

MEET = """
import os, sys
from onehour.dist import meeting
from onehour.dist.launched import launched
meeting.FIRST, meeting.EVERY, meeting.ANSWER = 0.5, 1.0, 2.0
try:
    store, hosts = meeting.meet(launched(), limit=float(sys.argv[1]))
    text = f"met {len(hosts)}"
    store.set(os.environ["RANK"], "")
    store.wait([str(rank) for rank in range(len(hosts))])  # process 0 keeps the store for the others
    if os.environ["RANK"] == "0":
        store.add("left", 0)
        while store.add("left", 0) < len(hosts) - 1: pass
    else:
        store.add("left", 1)
except (ValueError, TimeoutError) as error:
    text = f"{type(error).__name__}: {error}"
sys.stdout.write(text)
sys.stdout.flush()
os._exit(0)
"""


def meet(*ranks: int, port: int, size: int = 2, limit: float = 90.0, **environ: str) -> list[tuple[str, str]]:
    """What processes of these ranks give, and what they say on the way."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | environ
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, str(limit)],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    return [process.communicate(timeout=300) for process in started]


@pytest.mark.parametrize(("name", "size"), [("localhost", 3), (socket.gethostname(), 2)])
def test_all_come_and_nobody_says_anything(name: str, size: int, port: int):
    said = meet(*range(size), port=port, size=size, MASTER_ADDR=name)
    assert [given for given, _ in said] == [f"met {size}"] * size


def test_process_0_says_for_whom_it_waits_and_for_how_long_it_has(port: int):
    ((given, said),) = meet(0, port=port, size=3, limit=3.0)
    first, *more = said.splitlines()
    assert first.startswith(f"onehour: waiting for 2 of 3 processes (1, 2) to meet at 127.0.0.1:{port}, for ")
    assert "check whether each was started and what it says, and whether its host reaches that address" in first
    assert len(more) >= 1
    assert given.startswith("TimeoutError: process 0 on ")
    assert "waited 3 s for 2 of 3 processes (1, 2) to meet" in given


def test_the_others_say_which_address_they_try_and_why_they_cannot(port: int):
    ((given, said),) = meet(1, port=port, limit=3.0)
    line = said.splitlines()[0]
    assert line.startswith("onehour: waiting for process 0 of 2: process 1 on ")
    assert f"tries 127.0.0.1:{port} (Connection refused), for" in line
    assert f"TimeoutError: process 1 on {socket.gethostname()} waited 3 s for process 0 of 2" in given
    ((_, said),) = meet(1, port=port, limit=3.0, MASTER_ADDR="no-such-host.invalid")
    assert f"tries no-such-host.invalid:{port} (" in said
    assert "Name or service not known" in said or "name resolution" in said


def silent(listener: socket.socket) -> None:
    with ExitStack() as taken, suppress(OSError):
        while True:
            taken.enter_context(listener.accept()[0])


def answers(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            with listener.accept()[0] as connection:
                connection.recv(99)
                connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")


@pytest.mark.parametrize("program", [silent, answers])
def test_a_port_of_another_program_is_one_message_on_every_process(program: Callable[[socket.socket], None]):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=program, args=(listener,), daemon=True)
        thread.start()
        for given, said in meet(0, 1, port=port):
            assert given.startswith(
                f"ValueError: port {port} of 127.0.0.1, where the processes of this run are to meet"
            )
            assert "is used by another program" in given
            assert "set MASTER_PORT to a free one" in given
            assert said == ""
        listener.shutdown(socket.SHUT_RDWR)  # which ends its accept, as closing alone does not
        thread.join()


def test_a_store_of_another_program_is_no_place_to_meet():
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for given, _ in meet(0, 1, port=store.port):
        assert "is used by another program" in given


def test_a_second_process_of_the_same_rank_and_another_number_of_processes_are_noticed():
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = PrefixStore("onehour", store)  # as process 0 of two leaves it, and one that came as process 1
    names.set("process 0", '{"size": 2}')
    names.add("claims of 1", 1)
    ((given, _),) = meet(1, port=store.port)
    assert given.startswith(f"ValueError: two processes have come to 127.0.0.1:{store.port} as process 1 of 2")
    ((given, _),) = meet(2, port=store.port, size=3)
    assert given.startswith(f"ValueError: WORLD_SIZE is 3 on process 2, but 2 on process 0 at 127.0.0.1:{store.port}")


PLACE = Launched(rank=0, size=2, address="gpu07", port=20017)
HERE, THERE = Host("gpu07", "a:1", ""), Host("gpu08", "b:1", "10.0.0.8")
DEVICES = [(1, "lo"), (2, "eth0"), (3, "ib0")]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A host with a network of two devices; what its names stand for, to be changed."""
    names = {"gpu07": ["10.0.0.7"]}
    addresses = {"lo": ["127.0.0.1"], "eth0": ["192.168.0.7"], "ib0": ["10.0.0.7"]}
    monkeypatch.delenv(GLOO_DEVICE, raising=False)
    monkeypatch.setattr("onehour.dist.meeting.socket.if_nameindex", lambda: DEVICES)
    monkeypatch.setattr("onehour.dist.meeting.socket.gethostname", lambda: "gpu07")
    monkeypatch.setattr(meeting, "_addresses", lambda name: names.get(name, []))
    monkeypatch.setattr(meeting, "_of_device", addresses.__getitem__)
    monkeypatch.setattr(meeting, "_is_here", lambda address: any(address in each for each in addresses.values()))
    monkeypatch.setattr(meeting, "_address_towards", lambda name: "10.0.0.7" if name == "10.0.0.8" else "")
    return names


def test_on_one_machine_it_is_the_loopback_device(devices: dict[str, list[str]]):
    assert choose_device(Launched(size=2, address="localhost"), []) == "lo"
    assert choose_device(PLACE, [HERE, HERE]) == "lo"


def test_a_name_that_other_hosts_can_use_is_left_to_gloo(devices: dict[str, list[str]]):
    assert choose_device(PLACE, [HERE, THERE]) is None


@pytest.mark.parametrize("found", [["127.0.1.1"], ["::1"], [], ["10.9.9.9"]])
def test_where_the_name_is_of_no_use_the_device_towards_the_others_is_found(
    devices: dict[str, list[str]], found: list[str]
):
    devices["gpu07"] = found
    assert choose_device(PLACE, [HERE, THERE]) == "ib0"
    own = Host("gpu07", "a:1", "192.168.0.7")  # as process 1, which knows how it reaches process 0
    assert choose_device(Launched(rank=1, size=2, address="gpu08"), [THERE, own]) == "eth0"


@pytest.mark.parametrize(("found", "said"), [(["127.0.1.1"], "is 127.0.1.1"), ([], "has no address")])
def test_where_none_is_found_the_variable_and_what_cannot_be_bound_are_named(
    devices: dict[str, list[str]], found: list[str], said: str
):
    devices["gpu07"] = found
    with pytest.raises(ValueError, match=rf"gpu07, {said} here, which cannot be bound .*set GLOO_SOCKET_IFNAME .*ib0"):
        choose_device(PLACE, [HERE, Host("gpu08", "b:1", "")])


def test_a_device_that_a_user_names_must_be_there(devices: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(GLOO_DEVICE, "ib0")
    assert choose_device(PLACE, [HERE, THERE]) is None
    monkeypatch.setenv(GLOO_DEVICE, "ib1")
    with pytest.raises(
        ValueError, match="GLOO_SOCKET_IFNAME is 'ib1', but gpu07 has no network device ib1; expected one"
    ):
        choose_device(PLACE, [HERE, THERE])


def test_processes_of_one_machine_share_its_name_and_need_no_address():
    here = this_host(Launched(size=2, address="127.0.0.1"))
    assert here == this_host(Launched(rank=1, size=2, address="127.0.0.1"))
    assert (here.name, here.address) == (socket.gethostname(), "")


@pytest.mark.parametrize(("without", "expected"), [((), "127.0.0.1"), (("127.0.0.1",), "::1")])
def test_without_127_0_0_1_processes_meet_at_the_other_loopback_address(
    monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...], expected: str
):
    refuse(monkeypatch, *without)
    if expected == "::1" and not meeting._is_here("::1"):
        pytest.skip("this machine has no IPv6")
    assert loopback() == expected


def test_without_a_loopback_device_it_is_said_what_cannot_be_bound(monkeypatch: pytest.MonkeyPatch):
    refuse(monkeypatch, "127.0.0.1", "::1")
    with pytest.raises(ValueError, match=r"neither 127\.0\.0\.1 \(.*\) nor ::1 \(.*\) can be bound.*ip link set lo up"):
        loopback()


def refuse(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Take addresses away from this machine."""

    class Socket(socket.socket):
        def bind(self, address: tuple[str, int]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - enough here
            if address[0] in addresses:
                raise OSError(99, "Cannot assign requested address")
            super().bind(address)

    monkeypatch.setattr("onehour.dist.meeting.socket.socket", Socket)

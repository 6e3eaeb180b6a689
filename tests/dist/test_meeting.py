"""How processes find each other, and what they say while they wait: each in a process of its own."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "size"), [("localhost", 3), (socket.gethostname(), 2)])
def test_all_come_and_nobody_says_anything(name: str, size: int):
    said = meet(*range(size), port=free_port(), size=size, MASTER_ADDR=name)
    assert [given for given, _ in said] == [f"met {size}"] * size


@pytest.mark.timeout(600)
def test_process_0_says_for_whom_it_waits_and_for_how_long_it_has():
    ((given, said),) = meet(0, port=(port := free_port()), size=3, limit=3.0)
    first, *more = said.splitlines()
    assert first.startswith(f"onehour: waiting for 2 of 3 processes (1, 2) to meet at 127.0.0.1:{port}, for ")
    assert "look whether each was started and what it says, and whether its host reaches that address" in first
    assert len(more) >= 1
    assert given.startswith("TimeoutError: process 0 on ")
    assert "waited 3 s for 2 of 3 processes (1, 2) to meet" in given


@pytest.mark.timeout(600)
def test_the_others_say_which_address_they_try_and_why_they_cannot():
    ((given, said),) = meet(1, port=(port := free_port()), limit=3.0)
    line = said.splitlines()[0]
    assert line.startswith("onehour: waiting for process 0 of 2: process 1 on ")
    assert f"tries 127.0.0.1:{port} (Connection refused), for" in line
    assert f"TimeoutError: process 1 on {socket.gethostname()} waited 3 s for process 0 of 2" in given
    ((_, said),) = meet(1, port=port, limit=3.0, MASTER_ADDR="no-such-host.invalid")
    assert f"tries no-such-host.invalid:{port} (" in said
    assert "Name or service not known" in said or "name resolution" in said


def silent(listener: socket.socket) -> None:
    taken = []
    while True:
        taken.append(listener.accept())


def answers(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.recv(99)
            connection.sendall(b"HTTP/1.0 400 Bad Request\r\n\r\n")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", [silent, answers])
def test_a_port_of_another_program_is_one_message_on_every_process(program: Callable[[socket.socket], None]):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=program, args=(listener,), daemon=True).start()
        for given, said in meet(0, 1, port=port):
            assert given.startswith(
                f"ValueError: port {port} of 127.0.0.1, where the processes of this run are to meet"
            )
            assert "is used by another program" in given
            assert "set MASTER_PORT to a free one" in given
            assert said == ""


@pytest.mark.timeout(600)
def test_a_store_of_another_program_is_no_place_to_meet():
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for given, _ in meet(0, 1, port=store.port):
        assert "is used by another program" in given


@pytest.mark.timeout(600)
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

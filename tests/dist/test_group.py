"""A process's place among p; what p > 1 exchange is tested in tests/training/test_processes.py."""

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from simulated_gpu import SimulatedGpu
from torch._C._distributed_c10d import HashStore

from onehour.dist.group import Group, PeerLostError, joined, peer_lost
from onehour.dist.launch import meeting_place
from onehour.dist.launched import LOOPBACK

pytestmark = pytest.mark.usefixtures("forked")


def second_of_two(monkeypatch: pytest.MonkeyPatch, **changes: Callable[..., object]) -> None:
    """What a launcher tells process 1; it finds the others at once, and torch.distributed does nothing else."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": LOOPBACK, "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr("onehour.dist.group.meet", lambda place, **_: (HashStore(), []))
    for name in ("init_process_group", "get_rank", "destroy_process_group"):
        monkeypatch.setattr(f"onehour.dist.group.dist.{name}", changes.get(name, lambda **_: 1))


def test_one_process_needs_no_other():
    group = Group()
    tensor = torch.tensor([1.0, 2.0])
    assert group.sum(tensor) is tensor
    assert tensor.tolist() == [1, 2]
    assert [group.broadcast(payload) for payload in (None, b"", b"x")] == [None, b"", b"x"]


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_alone_no_process_group_is_made(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with joined("cpu") as group:
        assert (group.rank, group.size, group.device) == (0, 1, torch.device("cpu"))
        assert not torch.distributed.is_initialized()


def test_the_group_is_left_when_the_run_fails(monkeypatch: pytest.MonkeyPatch):
    left = []
    second_of_two(
        monkeypatch,
        init_process_group=lambda **options: left.append(options["backend"]),
        destroy_process_group=lambda: left.append("left"),
    )

    def run() -> None:
        with joined("cpu") as group:
            assert (group.rank, group.size) == (1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert left == ["gloo", "left"]


def test_an_error_on_gpus_aborts_what_is_pending_before_the_group_is_left(monkeypatch: pytest.MonkeyPatch):
    left: list[str] = []

    def run() -> None:
        with joined("cuda"):
            raise ZeroDivisionError

    with SimulatedGpu(gpus=2), monkeypatch.context() as patched:
        second_of_two(
            patched,
            init_process_group=lambda **options: left.append(options["backend"]),
            destroy_process_group=lambda: left.append("left"),
        )
        patched.setenv("LOCAL_RANK", "1")
        world = SimpleNamespace(abort=lambda: left.append("aborted"))
        patched.setattr("onehour.dist.group.dist.group", SimpleNamespace(WORLD=world))
        with pytest.raises(ZeroDivisionError):
            run()
    assert left == ["nccl", "aborted", "left"]


SAID = [
    "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:39531",
    "[gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:40917: Connection reset by peer",
    "NCCL error: remote process exited or there was a network error",
]


@pytest.mark.parametrize("said", SAID)
@pytest.mark.parametrize("when", ["joining", "training"])
def test_a_lost_process_is_one_message_and_no_trace(monkeypatch: pytest.MonkeyPatch, said: str, when: str):
    def fail(**_: object) -> None:
        raise RuntimeError(said)

    second_of_two(monkeypatch, **({"init_process_group": fail} if when == "joining" else {}))
    with pytest.raises(PeerLostError, match="process 1 lost another process, and cannot go on: "), joined("cpu"):
        fail()


def test_other_errors_keep_their_own_type(monkeypatch: pytest.MonkeyPatch):
    assert not peer_lost(RuntimeError("shapes do not match"))
    assert not peer_lost(ValueError("closed by peer"))
    second_of_two(monkeypatch)
    for said in ("shapes do not match", "DataLoader timed out after 5 seconds"):
        with pytest.raises(RuntimeError, match=said), joined("cpu"):
            raise RuntimeError(said)


JOINS = """
import os, sys, time
import torch
from onehour.dist import group, meeting
group.PATIENCE = 2.0
meet = meeting.meet
group.meet = lambda place, **about: meet(place, limit=float(sys.argv[1]), **about)
try:
    with group.joined("cpu") as joined:
        if joined.rank == 1:
            time.sleep(5)
        joined.sum(torch.ones(1))
except group.PeerLostError as error:
    sys.stdout.write(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
os._exit(0)
"""


def joins(*ranks: int, limit: float = 60.0) -> list[str]:
    """What the processes of these ranks, of two, say in the end."""
    with meeting_place(0) as port:
        shared = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
        shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
        started = [
            subprocess.Popen(
                [sys.executable, "-c", JOINS, str(limit)],
                env=os.environ | shared | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for rank in ranks
        ]
        return [process.communicate(timeout=100)[0] for process in started]


def test_one_that_never_comes_is_one_message_with_the_limit_and_the_meeting_place():
    (said,) = joins(1, limit=2.0)
    assert said.startswith("PeerLateError: process 1 on ")
    assert " waited 2 s for 1 of 2 processes (0) to meet at 127.0.0.1:" in said
    assert "check whether each was started" in said
    assert "\n" not in said


def test_one_that_does_not_come_to_an_exchange_is_one_message_too():
    first, second = joins(0, 1)
    assert first.startswith("PeerLateError: process 0 waited 2 s for another of 2 in the middle of the run")
    assert "\n" not in first
    assert second.startswith("PeerLostError: process 1 lost another process")


@pytest.mark.parametrize(("patience", "limit"), [(0.0, 600), (1000.0, 1000), (1e300, 1e7)])
def test_the_watchdog_has_more_than_ten_minutes_if_it_needs_them(
    monkeypatch: pytest.MonkeyPatch, patience: float, limit: float
):
    limits = []
    second_of_two(monkeypatch, init_process_group=lambda **options: limits.append(options["timeout"]))
    with joined("cpu", patience=patience):
        assert [each.total_seconds() for each in limits] == [limit]

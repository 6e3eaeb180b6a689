"""A process's place among p; what p > 1 exchange is tested in tests/train/test_processes.py."""

import pytest
import torch

from onehour.dist.group import Group, PeerLostError, joined, peer_lost


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
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("onehour.dist.group.dist.init_process_group", lambda **options: left.append(options["backend"]))
    monkeypatch.setattr("onehour.dist.group.dist.get_rank", lambda: 1)
    monkeypatch.setattr("onehour.dist.group.dist.destroy_process_group", lambda: left.append("left"))

    def run() -> None:
        with joined("cpu") as group:
            assert (group.rank, group.size) == (1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert left == ["gloo", "left"]


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

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    place = "onehour.dist.group.dist"
    monkeypatch.setattr(f"{place}.init_process_group", fail if when == "joining" else lambda **_: None)
    monkeypatch.setattr(f"{place}.get_rank", lambda: 1)
    monkeypatch.setattr(f"{place}.destroy_process_group", lambda: None)
    with pytest.raises(PeerLostError, match="process 1 lost another one, and cannot go on: "), joined("cpu"):
        fail()


def test_other_errors_keep_their_own_type(monkeypatch: pytest.MonkeyPatch):
    assert not peer_lost(RuntimeError("shapes do not match"))
    assert not peer_lost(ValueError("closed by peer"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    for name in ("init_process_group", "get_rank", "destroy_process_group"):
        monkeypatch.setattr(f"onehour.dist.group.dist.{name}", lambda **_: 1)
    with pytest.raises(RuntimeError, match="shapes"), joined("cpu"):
        raise RuntimeError("shapes do not match")

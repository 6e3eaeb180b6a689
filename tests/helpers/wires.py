"""Threads in place of processes: what torch.distributed does for them, with a queue for each pair of ranks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from onehour.dist import canonical, group, reducer
from onehour.dist.canonical import in_background
from onehour.dist.group import Group


class Wires:
    """torch.distributed between threads."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, size: int) -> None:
        self.size = size
        # All at once: two threads that both find one missing would each make their own.
        self.queues = {pair: queue.Queue[Tensor]() for pair in product(range(size), repeat=2)}
        self.local = threading.local()

    def isend(self, tensor: Tensor, dst: int, tag: int) -> Any:
        self.send(tensor, dst)
        return SimpleNamespace(wait=lambda: None)

    def irecv(self, tensor: Tensor, src: int, tag: int) -> Any:
        return SimpleNamespace(wait=lambda: self.recv(tensor, src))

    def send(self, tensor: Tensor, dst: int) -> None:
        self.queues[self.local.rank, dst].put(tensor.clone())

    def recv(self, tensor: Tensor, src: int) -> None:
        tensor.copy_(self.queues[src, self.local.rank].get(timeout=300))

    def in_background(self, act: Callable[[], None]) -> Callable[[], object]:
        """In a thread of its own, as the same rank."""
        rank = self.local.rank

        def as_rank() -> None:
            self.local.rank = rank
            act()

        return in_background(as_rank)

    def all_reduce(self, tensor: Tensor, op: Any, async_op: bool = False) -> Any:
        """In the order of the ranks, as it must be the same everywhere."""
        assert op == self.ReduceOp.SUM
        own = tensor.clone()
        for rank in range(self.size):
            if rank != self.local.rank:
                self.send(own, rank)
        tensor.zero_()
        for rank in range(self.size):
            given = own if rank == self.local.rank else torch.empty_like(own)
            if rank != self.local.rank:
                self.recv(given, rank)
            tensor += given
        return SimpleNamespace(wait=lambda: None)


def on_threads(monkeypatch: pytest.MonkeyPatch, size: int, act: Callable[[Group], Any]) -> list[Any]:
    """What `act` returns on each of so many ranks."""
    wires = Wires(size)
    for module in (canonical, reducer, group):
        monkeypatch.setattr(module, "dist", wires)
    monkeypatch.setattr(canonical, "in_background", wires.in_background)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        wires.local.rank = rank
        results[rank] = act(Group(rank=rank, size=size))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert all(result is not None for result in results)
    return results

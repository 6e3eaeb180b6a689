"""The canonical sum: one order of adding for every number of processes, and the bytes it moves."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from wires import on_threads

from onehour.dist import canonical
from onehour.dist.canonical import CanonicalReducer, canonical_sum
from onehour.dist.group import Group
from onehour.dist.placement import place_by_halving
from onehour.rules.aggregate import halve, merges_after

WORKERS = (4, 5, 6, 8, 12, 24, 40, 44, 100)


def values(workers: int, length: int = 37) -> list[Tensor]:
    """Of very different sizes, so that every order of adding gives other bits."""
    generator = torch.Generator().manual_seed(workers)
    scale = 10.0 ** torch.randint(-6, 6, (workers, length), generator=generator)
    return list(torch.randn(workers, length, generator=generator) * scale)


def reduce(group: Group, leaves: list[Tensor], **options: int) -> tuple[Tensor, int]:
    """What a process does with its workers' vectors, as the gradients of two parameters."""
    share = place_by_halving(len(leaves), group.size)[group.rank]
    parameters = [nn.Parameter(torch.zeros(length)) for length in (30, len(leaves[0]) - 30)]
    reducer = CanonicalReducer(parameters, tail=1, group=group, share=share, **options)
    reducer.zero()
    for worker in share:
        if worker == share[-1]:
            reducer.arm()
        given = leaves[worker].split([30, len(leaves[0]) - 30])
        sum((p * leaf).sum() for p, leaf in zip(parameters, given, strict=True)).backward()  # type: ignore[union-attr]
        reducer.tail.fill_(1)
        reducer.take()
    reducer.finish()
    assert float(reducer.tail) == len(leaves)
    return torch.cat([p.grad for p in parameters if p.grad is not None]), reducer.bytes_sent


def tree_sum(values: Sequence[Tensor]) -> Tensor:
    """Σ of the workers' values along the tree."""
    left, right = halve(range(len(values)))
    return tree_sum(values[: len(left)]) + tree_sum(values[len(left) :]) if left else values[right.start]


@pytest.mark.parametrize("workers", WORKERS)
def test_the_bits_are_those_of_the_tree_for_every_number_of_processes(workers: int, monkeypatch: pytest.MonkeyPatch):
    leaves = values(workers)
    expected = tree_sum(leaves)
    exact = torch.stack([leaf.double() for leaf in leaves]).sum(0)
    spread = torch.stack([leaf.double().abs() for leaf in leaves]).sum(0)
    assert float(((expected - exact).abs() / spread).max()) < 1e-6  # float32 adds k numbers with log2(k) roundings
    for processes in range(1, min(8, workers) + 1):
        for bucket_bytes in (1, 10**9):
            found = on_threads(
                monkeypatch, processes, lambda group, b=bucket_bytes: reduce(group, leaves, bucket_bytes=b)
            )
            for total, _ in found:
                assert torch.equal(total, expected)


def test_vectors_of_several_parts_are_added_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(canonical, "PART", 5)
    leaves = values(8)
    for total, _ in on_threads(monkeypatch, 4, lambda group: reduce(group, leaves)):
        assert torch.equal(total, tree_sum(leaves))


def test_adding_in_turn_gives_other_bits():
    """What the tree is for: the plain order of adding, which changes with p, is not it."""
    leaves = values(12)
    in_turn = leaves[0].clone()
    for leaf in leaves[1:]:
        in_turn += leaf
    assert not torch.equal(in_turn, tree_sum(leaves))


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_at_powers_of_two_each_process_sends_what_the_paper_says(processes: int, monkeypatch: pytest.MonkeyPatch):
    """2·(p − 1)/p·b bytes, §4."""
    length = 16 * processes
    results = on_threads(monkeypatch, processes, lambda group: canonical_sum(torch.ones(length), group))
    assert results == [2 * (processes - 1) * length * 4 // processes] * processes


def test_at_other_numbers_all_that_is_sent_up_the_tree_and_back_is_counted(monkeypatch: pytest.MonkeyPatch):
    """Of six: 0 has 1 and 3 below it; 4 has 5, and 3 has 4; each of five edges is crossed once each way."""
    sent = on_threads(monkeypatch, 6, lambda group: canonical_sum(torch.ones(10), group))
    assert sent == [2 * 40, 2 * 40, 40, 2 * 40, 2 * 40, 40]


def test_a_bucket_is_summed_while_backward_goes_on(monkeypatch: pytest.MonkeyPatch):
    """Its sum waits until backward has come further, which it would never do if it were not beside it."""
    further, events = threading.Event(), list[str]()

    def waits(bucket: Tensor, *_: Any) -> int:
        assert further.wait(20)
        events.append(f"sum of {len(bucket)}")
        return 1

    monkeypatch.setattr(canonical, "canonical_sum", waits)
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    reducer = CanonicalReducer([a, b], tail=1, group=Group(size=2), share=range(2), bucket_bytes=1)
    reducer.zero()
    (a.sum() * b.sum()).backward()
    reducer.take()
    reducer.arm()
    first = a.sum() * 1
    first.register_hook(lambda gradient: events.append("backward reaches a"))
    first.register_hook(lambda gradient: further.set())
    (first * b).sum().backward()
    reducer.take()
    reducer.finish()
    assert events == ["backward reaches a", "sum of 2", "sum of 4"]
    assert reducer.bytes_sent == 2
    assert [p.grad.tolist() for p in (a, b) if p.grad is not None] == [[4.0] * 3, [6.0] * 2]


def test_what_fails_beside_backward_is_raised_at_the_end(monkeypatch: pytest.MonkeyPatch):
    def fails(*_: Any) -> int:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(canonical, "canonical_sum", fails)
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    reducer = CanonicalReducer([a, b], tail=1, group=Group(size=2), share=range(1), bucket_bytes=1)
    reducer.zero()
    reducer.arm()
    (a.sum() * b.sum()).backward()
    reducer.take()
    with pytest.raises(RuntimeError, match="closed by peer"):
        reducer.finish()


@given(st.integers(1, 200))
@settings(max_examples=50)
def test_walking_the_tree_holds_few_vectors(workers: int):
    held = most = 0
    for merges in merges_after(range(workers)):
        held += 1
        most = max(most, held)
        held -= merges
    assert held == 1
    assert most <= np.ceil(np.log2(max(workers, 2))) + 1


@given(st.integers(1, 300), st.data())
@settings(max_examples=50)
def test_processes_host_nodes_of_the_tree(workers: int, data: st.DataObject):
    """Merging each share by itself, then the shares as the processes halve, is the whole tree."""
    processes = data.draw(st.integers(1, workers))
    shares = place_by_halving(workers, processes)
    assert [j for share in shares for j in share] == list(range(workers))
    leaves = [f"{j}" for j in range(workers)]

    def join(parts: list[str]) -> str:
        half = len(parts) // 2
        return f"({join(parts[:half])}+{join(parts[half:])})" if half else parts[0]

    by_process = [join([leaves[j] for j in share]) for share in shares]
    assert join(by_process) == join(leaves)

"""The same bits for every number of processes: sums over the k workers along one fixed tree (paper §4).

A process adds its own workers along the tree; processes go on with the paper's recursive halving and doubling, which
adds in the same order where p is a power of two. For other p the tree is followed with plain sends to its nodes and
back: the same bits for more bytes. The paper's binary blocks would be fewer, but they add in another order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onehour.dist.cost import BUCKET_BYTES
from onehour.dist.group import Group
from onehour.dist.reducer import Reducer
from onehour.rules.aggregate import halve, merges_after

PART = 2**20
"""Elements that travel together: large enough for the wire, small enough that adding hides behind the next."""


class CanonicalReducer(Reducer):
    """A `Reducer` whose sum over the workers has the same bits wherever they run.

    Takes one worker a pass, or as many as the recipe's `canonical_pass` says. The last pass's gradients go up the tree
    bucket by bucket, as they arrive; so elements travel while backward goes on, and each is still added in the tree's
    order. Holds at most log2(k) + 2 vectors.

    Args:
        parameters: those to train, of one dtype on one device.
        tail: how many floats travel behind the gradients.
        group: the processes to sum over.
        share: this process's leaves, one node of the tree (`place_by_halving`).
        bucket_bytes: the size at which a bucket closes.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> reducer = CanonicalReducer([weight], tail=1, group=Group(), share=range(2))
    >>> reducer.zero()
    >>> for factor in (3, 4):
    ...     (factor * weight).sum().backward(); reducer.take()
    >>> reducer.finish(); weight.grad
    tensor([7., 7.])
    """

    takes_each_pass = True

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        tail: int,
        group: Group,
        share: range,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        super().__init__(parameters, tail=tail, group=group, bucket_bytes=bucket_bytes)
        self.host(share)
        self.bytes_sent = 0
        longest = max((len(bucket) for bucket in self.buckets), default=0)
        self._scratch = self.tail.new_empty((longest + 1) // 2)

    def host(self, share: range) -> None:
        """Go on with another node of the tree."""
        self._merges = merges_after(share)

    def zero(self) -> None:
        """Begin an iteration: no gradient, a tail of zeros."""
        super().zero()
        self._taken = 0
        self._nodes: list[list[Tensor]] = []
        """What waits for its other half of the tree: the gradients, then the tail."""

    @torch.no_grad()
    def take(self) -> None:
        """Add what the worker that has just passed gave to the tree; `finish` adds what the last one did."""
        self._taken += 1
        if self._taken == len(self._merges):
            return
        self._nodes.append([*super()._of_this_process(range(len(self.parameters))), self.tail.clone()])
        for _ in range(self._merges[self._taken - 1]):
            right = self._nodes.pop()
            torch._foreach_add_(self._nodes[-1], right)  # pyright: ignore[reportPrivateImportUsage]
        super().zero()

    @torch.no_grad()
    def finish(self) -> None:
        """Sum over the processes: every `.grad`, and the tail, is then the sum over all workers."""
        assert self._taken == len(self._merges)
        self.tail.copy_(self._up_the_tree(slice(-1, None), [self.tail])[0])
        if self.group.size == 1:
            every = range(len(self.parameters))
            for p, total in zip(self.parameters, self._of_this_process(every), strict=True):
                p.grad = total
        super().finish()

    def _of_this_process(self, members: range) -> list[Tensor]:
        return self._up_the_tree(slice(members.start, members.stop), super()._of_this_process(members))

    def _up_the_tree(self, of: slice, right: list[Tensor]) -> list[Tensor]:
        """Add what the last worker gave to all that wait for it."""
        for node in reversed(self._nodes):
            left = node[of]
            torch._foreach_add_(left, right)  # pyright: ignore[reportPrivateImportUsage]
            right = left
        return right

    def _begin(self, bucket: Tensor) -> Callable[[], object]:
        before = self._work[-1] if self._work else _nothing

        def act() -> None:
            before()  # on every process in one order
            self.bytes_sent += canonical_sum(bucket, self.group, self._scratch)

        if self._armed and not bucket.is_cuda:
            return in_background(act)
        act()  # NCCL is asynchronous by itself, in the order of its stream
        return _nothing


def _nothing() -> None:
    pass


def in_background(act: Callable[[], None]) -> Callable[[], object]:
    """Act in a thread; gives what waits for it, and raises what it raised.

    The thread is a daemon: it may wait for a process that is gone when this one leaves.
    """
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="reduction", daemon=True).start()
    return future.result


@torch.no_grad()
def canonical_sum(vector: Tensor, group: Group, scratch: Tensor | None = None) -> int:
    """Σ over the processes along the tree that halves [0, p), in place; returns how many bytes this process sent.

    At powers of two each process sends 2·(p − 1)/p·b bytes for a vector of b. A caller may keep `scratch`, room for
    half of the vector, rounded up.
    """
    if group.size & (group.size - 1):
        return _along_the_tree(vector, group)
    scratch = vector.new_empty((len(vector) + 1) // 2) if scratch is None else scratch
    return _halving_doubling(vector, group, scratch)


def _halving_doubling(vector: Tensor, group: Group, scratch: Tensor) -> int:
    """Halve the span and double the distance while adding, then the way back while gathering.

    Neighbours add first, so each element's sum follows the tree over the processes; IEEE addition commutes, so it does
    not matter which partner adds.
    """
    rank, span, spans, sent, distance = group.rank, range(len(vector)), list[tuple[range, range]](), 0, 1
    while distance < group.size:
        first, second = halve(span)
        keep, give = (first, second) if rank & distance == 0 else (second, first)
        mine, given, received = vector[keep.start : keep.stop], vector[give.start : give.stop], scratch[: len(keep)]
        for part in _exchange(given, received, rank ^ distance):
            mine[part].add_(received[part])
        sent += given.nbytes
        spans.append((keep, give))
        span, distance = keep, distance * 2
    for keep, give in reversed(spans):
        distance //= 2
        mine = vector[keep.start : keep.stop]
        for _ in _exchange(mine, vector[give.start : give.stop], rank ^ distance):
            pass
        sent += mine.nbytes
    return sent


def _exchange(outgoing: Tensor, incoming: Tensor, partner: int) -> Iterator[slice]:
    """Send and receive at once, in parts, and say which part has come: it is added while the next one travels."""
    parts = [[slice(start, start + PART) for start in range(0, len(way), PART)] for way in (outgoing, incoming)]
    if outgoing.is_cuda:  # NCCL must be told of both directions together
        operations = [dist.P2POp(dist.isend, outgoing[part], partner) for part in parts[0]]
        operations += [dist.P2POp(dist.irecv, incoming[part], partner) for part in parts[1]]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        yield slice(None)
        return
    receives = [dist.irecv(incoming[part], partner, tag=tag) for tag, part in enumerate(parts[1])]
    sends = [dist.isend(outgoing[part], partner, tag=tag) for tag, part in enumerate(parts[0])]
    for part, work in zip(parts[1], receives, strict=True):
        assert work is not None
        work.wait()
        yield part
    for work in sends:
        assert work is not None
        work.wait()


def _along_the_tree(vector: Tensor, group: Group) -> int:
    """Add up the tree and take the sum back down, in place; returns the bytes this process sent."""
    edges, other, sent = _edges(range(group.size)), torch.empty_like(vector), 0
    for left, right in edges:
        if group.rank == left:
            dist.recv(other, src=right)
            vector += other
        elif group.rank == right:
            dist.send(vector, dst=left)
            sent += vector.nbytes
    for left, right in reversed(edges):
        if group.rank == left:
            dist.send(vector, dst=right)
            sent += vector.nbytes
        elif group.rank == right:
            dist.recv(vector, src=left)
    return sent


def _edges(hosts: range) -> list[tuple[int, int]]:
    """Whose sums are added, (the first of a left half, of its right half), halves before what they make."""
    if len(hosts) == 1:
        return []
    left, right = halve(hosts)
    return [*_edges(left), *_edges(right), (left.start, right.start)]

"""The same bits for every number of processes: sums over the k workers along one fixed tree (paper §4).

A process adds its own workers along the tree; processes go on with the paper's recursive halving and doubling, which
adds in the same order where p is a power of two. For other p the tree is followed with plain sends to its nodes and a
broadcast: the same bits for more bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onehour.dist.group import Group
from onehour.dist.reducer import part_for
from onehour.rules.aggregate import halve, merges_after

__all__ = ["CanonicalReducer", "canonical_sum"]

PART = 2**20
"""Elements that travel together: large enough for the wire, small enough that adding hides behind the next."""


class CanonicalReducer:
    """A `Reducer` whose sum over the workers has the same bits wherever they run.

    Takes one worker a pass. Holds at most log2(k) + 2 vectors.

    Args:
        parameters: those to train, of one dtype on one device.
        tail: how many floats travel behind the gradients.
        group: the processes to sum over.
        share: this process's workers, one node of the tree (`place_by_halving`).

    >>> weight = nn.Parameter(torch.ones(2))
    >>> reducer = CanonicalReducer([weight], tail=1, group=Group(), share=range(2))
    >>> reducer.zero()
    >>> for factor in (3, 4):
    ...     (factor * weight).sum().backward(); reducer.take()
    >>> reducer.finish(); weight.grad
    tensor([7., 7.])
    """

    takes_each_pass = True

    def __init__(self, parameters: Sequence[nn.Parameter], *, tail: int, group: Group, share: range) -> None:
        self.group = group
        self.parameters = list(reversed(parameters))
        self._gradients = sum(p.numel() for p in parameters)
        self.tail = self.parameters[0].new_zeros(tail)
        self._merges = merges_after(share)
        self._partial: list[Tensor] = []
        self._taken = 0
        self.bytes_sent = 0
        length = self._gradients + tail
        self._padding = -length % group.size  # so that halves are whole without a copy
        halves = (length + self._padding) // 2 if group.size > 1 else 0
        self._scratch = self.tail.new_empty(halves)

    def zero(self) -> None:
        """Begin an iteration.

        >>> CanonicalReducer([nn.Parameter(torch.ones(2))], tail=0, group=Group(), share=range(1)).zero()
        """
        self._partial, self._taken = [], 0
        self._clear()

    def arm(self) -> None:
        """Nothing: every pass is taken whole.

        >>> CanonicalReducer([nn.Parameter(torch.ones(2))], tail=0, group=Group(), share=range(1)).arm()
        """

    def mark(self) -> list[int]:
        """The parameters without a gradient in this pass, by number.

        >>> CanonicalReducer([nn.Parameter(torch.ones(2))], tail=0, group=Group(), share=range(1)).mark()
        [0]
        """
        return [number for number, p in enumerate(self.parameters) if p.grad is None]

    @torch.no_grad()
    def take(self) -> None:
        """Add the gradients and the tail of the worker that has just passed to the tree.

        >>> reducer = CanonicalReducer([nn.Parameter(torch.ones(2))], tail=0, group=Group(), share=range(1))
        >>> reducer.zero(); reducer.take()
        """
        vector = self.tail.new_zeros(self._gradients + len(self.tail) + self._padding)
        for p, part in zip(self.parameters, self._parts(vector), strict=True):
            part.zero_() if p.grad is None else part.copy_(p.grad)
        vector[self._gradients :][: len(self.tail)] = self.tail
        self._partial.append(vector)
        for _ in range(self._merges[self._taken]):
            right = self._partial.pop()
            self._partial[-1] += right
        self._taken += 1
        self._clear()

    def finish(self) -> None:
        """Sum over the processes: every `.grad`, and the tail, is then the sum over all workers.

        >>> reducer = CanonicalReducer([nn.Parameter(torch.ones(2))], tail=0, group=Group(), share=range(1))
        >>> reducer.zero(); reducer.take(); reducer.finish()
        """
        (vector,) = self._partial
        vector, sent = canonical_sum(vector, self.group, self._scratch)
        self.bytes_sent += sent
        self._partial = [vector]
        self.tail.copy_(vector[self._gradients :][: len(self.tail)])
        for p, part in zip(self.parameters, self._parts(vector), strict=True):
            p.grad = part

    def summed(self) -> list[Tensor]:
        """Everything that was summed, as one vector.

        >>> reducer = CanonicalReducer([nn.Parameter(torch.ones(2))], tail=0, group=Group(), share=range(1))
        >>> reducer.zero(); reducer.take(); reducer.finish(); reducer.summed()
        [tensor([0., 0.])]
        """
        return self._partial

    def close(self) -> None:
        """Nothing to take back.

        >>> CanonicalReducer([nn.Parameter(torch.ones(2))], tail=0, group=Group(), share=range(1)).close()
        """

    def _parts(self, vector: Tensor) -> list[Tensor]:
        parts = vector[: self._gradients].split([p.numel() for p in self.parameters])
        return [part_for(p, part) for p, part in zip(self.parameters, parts, strict=True)]

    def _clear(self) -> None:
        self.tail.zero_()
        for p in self.parameters:
            p.grad = None


def canonical_sum(vector: Tensor, group: Group, scratch: Tensor | None = None) -> tuple[Tensor, int]:
    """Σ over the processes along the tree that halves [0, p), and how many bytes this process sent.

    At powers of two each process sends 2·(p − 1)/p·b bytes for a vector of b (padded to a multiple of p).

    Args:
        vector: overwritten.
        scratch: room for half of it, where the caller keeps some.

    >>> canonical_sum(torch.ones(2), Group())
    (tensor([1., 1.]), 0)
    """
    if group.size == 1:
        return vector, 0
    if group.size & (group.size - 1) == 0:
        return _halving_doubling(vector, group, scratch)
    sent = _along_the_tree(vector, range(group.size), group)
    dist.broadcast(vector, src=0)
    return vector, sent


def _halving_doubling(vector: Tensor, group: Group, scratch: Tensor | None) -> tuple[Tensor, int]:
    """Halve the span and double the distance while adding, then the way back while gathering.

    Neighbours add first, so each element's sum follows the tree over the processes; IEEE addition commutes, so it does
    not matter which partner adds.
    """
    rank, size, length = group.rank, group.size, len(vector)
    if length % size:
        vector = torch.nn.functional.pad(vector, (0, -length % size))
    if scratch is None:
        scratch = vector.new_empty(len(vector) // 2)
    span, spans, sent, distance = range(len(vector)), [], 0, 1
    while distance < size:
        first, second = halve(span)
        keep, give = (first, second) if rank & distance == 0 else (second, first)
        mine, received = vector[keep.start : keep.stop], scratch[: len(keep)]
        for part in _exchange(vector[give.start : give.stop], received, rank ^ distance):
            mine[part].add_(received[part])
        sent += mine.nbytes
        spans.append((keep, give))
        span, distance = keep, distance * 2
    for keep, give in reversed(spans):
        distance //= 2
        mine = vector[keep.start : keep.stop]
        for _ in _exchange(mine, vector[give.start : give.stop], rank ^ distance):
            pass
        sent += mine.nbytes
    return vector[:length], sent


def _exchange(outgoing: Tensor, incoming: Tensor, partner: int) -> Iterator[slice]:
    """Send and receive at once, in parts, and say which part has come: it is added while the next one travels."""
    parts = [slice(start, start + PART) for start in range(0, len(incoming), PART)]
    if outgoing.is_cuda:  # NCCL must be told of both directions together
        pairs = [(dist.isend, outgoing), (dist.irecv, incoming)]
        operations = [dist.P2POp(kind, tensor[part], partner) for part in parts for kind, tensor in pairs]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        yield slice(None)
        return
    receives = [dist.irecv(incoming[part], partner, tag=tag) for tag, part in enumerate(parts)]
    sends = [dist.isend(outgoing[part], partner, tag=tag) for tag, part in enumerate(parts)]
    for part, work in zip(parts, receives, strict=True):
        assert work is not None
        work.wait()
        yield part
    for work in sends:
        assert work is not None
        work.wait()


def _along_the_tree(vector: Tensor, hosts: range, group: Group) -> int:
    """Leave the sum over `hosts` in the first one's vector; returns the bytes this process sent."""
    if len(hosts) == 1:
        return 0
    left, right = halve(hosts)
    sent = 0
    for half in (left, right):
        if group.rank in half:
            sent += _along_the_tree(vector, half, group)
    if group.rank == right.start:
        dist.send(vector, dst=left.start)
        return sent + vector.nbytes
    if group.rank == left.start:
        other = torch.empty_like(vector)
        dist.recv(other, src=right.start)
        vector += other
    return sent

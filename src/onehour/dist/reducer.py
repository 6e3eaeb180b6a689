"""One vector an iteration: gradients and a tail of small values, summed over the processes (paper §3, §4).

The vector is cut into buckets fixed by the parameters' order, last parameters first as backward reaches them. Each
bucket is reduced as soon as its gradients are complete, while backward goes on (§4). The sum is all there is: the loss
was divided by kn before, so the summed gradient is the minibatch's mean (Remark 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from onehour.dist.cost import BUCKET_BYTES
from onehour.dist.group import Group


class Reducer:
    """Owns the vector, and gives every parameter its part of the sum as `.grad`.

    An iteration: `zero()`, one backward a pass with `arm()` before the last one, `finish()`. Between passes gradients
    accumulate where autograd puts them; they are copied into the vector once, when they are complete. One process
    needs no copy: its vector is the tail alone, its gradients stay where they are.

    Args:
        parameters: those to train, of one dtype on one device.
        tail: how many floats travel behind the gradients.
        group: the processes to sum over.
        bucket_bytes: the size at which a bucket closes.

    Raises:
        ValueError: if the parameters differ in dtype or device.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> reducer = Reducer([weight], tail=1, group=Group())
    >>> reducer.zero(); reducer.arm(); (3 * weight).sum().backward(); reducer.finish()
    >>> weight.grad, reducer.tail
    (tensor([3., 3.]), tensor([0.]))
    """

    takes_each_pass = False

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        *,
        tail: int,
        group: Group,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        kinds = {(p.dtype, p.device) for p in parameters}
        if len(kinds) != 1:
            raise ValueError(f"the model's parameters must share one dtype and device, found {sorted(map(str, kinds))}")
        self.group = group
        self.parameters = list(reversed(parameters))
        travelling = sum(p.numel() for p in parameters) if group.size > 1 else 0
        self._vector = self.parameters[0].new_zeros(travelling + tail)
        self.tail = self._vector[travelling:]
        self._armed = False
        self._handles: list[RemovableHandle] = []
        self._work: list[Callable[[], object]] = []
        """For each bucket whose sum has begun: waits for it."""
        self.buckets: list[Tensor] = []
        if group.size > 1:
            self._lay_out(bucket_bytes)

    def _lay_out(self, bucket_bytes: int) -> None:
        """Cut the vector into buckets of whole parameters; the last takes the tail along, and waits for `finish`."""
        self._views: list[Tensor] = []
        self._members: list[range] = []
        start = offset = first = 0
        for number, p in enumerate(self.parameters):
            self._views.append(part_for(p, self._vector[offset : offset + p.numel()]))
            offset += p.numel()
            if (offset - start) * p.element_size() >= bucket_bytes and number + 1 < len(self.parameters):
                self._members.append(range(first, number + 1))
                self.buckets.append(self._vector[start:offset])
                start, first = offset, number + 1
        self._members.append(range(first, len(self.parameters)))
        self.buckets.append(self._vector[start:])

    def host(self, share: range) -> None:
        """Go on with other workers of this process; a sum in any order does not ask which."""

    def zero(self) -> None:
        """Begin an iteration: no gradient, a tail of zeros."""
        self.tail.zero_()
        self._armed = False
        self._work = []
        for p in self.parameters:
            p.grad = None
        if self.group.size > 1:
            self._missing = [set(self.parameters[members.start : members.stop]) for members in self._members]

    def arm(self) -> None:
        """Say that the next backward is the iteration's last: its gradients are complete as they arrive."""
        self._armed = True
        if self.buckets and not self._handles:
            for bucket, members in enumerate(self._members[:-1]):
                hook = partial(self._arrived, bucket)
                self._handles += [self.parameters[n].register_post_accumulate_grad_hook(hook) for n in members]

    def mark(self) -> list[int]:
        """The parameters without a gradient in this process, by number; to be known before `finish` replaces them."""
        # What a launched bucket has taken has a gradient, or the bucket would have waited.
        return [number for number, p in enumerate(self.parameters) if p.grad is None]

    def take(self) -> None:
        """Nothing: passes accumulate where autograd puts them."""

    def finish(self) -> None:
        """Reduce what is left, the tail with it, and wait: every `.grad` is then the sum over all processes."""
        self._armed = False
        for bucket in range(len(self._work), len(self.buckets)):
            self._launch(bucket)
        for wait in self._work:
            wait()

    def summed(self) -> list[Tensor]:
        """Everything that was summed, in as few tensors as there are."""
        if self.group.size > 1:
            return [self._vector]
        return [self.tail, *(p.grad for p in self.parameters if p.grad is not None)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _arrived(self, bucket: int, parameter: Tensor) -> None:
        if not self._armed:
            return
        if bucket < len(self._work):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} got more of its gradient after autograd had said it"
                " was complete, as where torch.utils.checkpoint with use_reentrant=True runs a layer twice; use"
                " use_reentrant=False"
            )
        self._missing[bucket].discard(parameter)
        # In order: collectives must be launched alike on every process, whatever order gradients arrive in.
        while len(self._work) < len(self.buckets) - 1 and not self._missing[len(self._work)]:
            self._launch(len(self._work))

    @torch.no_grad()
    def _launch(self, bucket: int) -> None:
        members = self._members[bucket]
        views = self._views[members.start : members.stop]
        torch._foreach_copy_(views, self._of_this_process(members))  # pyright: ignore[reportPrivateImportUsage]
        for number, view in zip(members, views, strict=True):
            self.parameters[number].grad = view
        self._work.append(self._begin(self.buckets[bucket]))

    def _of_this_process(self, members: range) -> list[Tensor]:
        """The sums over this process's workers of some parameters' gradients; zeros for those that were not used."""
        parameters = self.parameters[members.start : members.stop]
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]

    def _begin(self, bucket: Tensor) -> Callable[[], object]:
        """Begin to sum a bucket over the processes; gives what waits for it."""
        work = dist.all_reduce(bucket, op=dist.ReduceOp.SUM, async_op=True)
        assert work is not None
        return work.wait


def part_for(parameter: Tensor, flat: Tensor) -> Tensor:
    """A part of a vector as the parameter's gradient, its elements in the same order in memory.

    Fused optimizers pair a weight with its gradient by their places in memory, whatever the strides say. And a
    channels_last gradient is copied without a transpose.
    """
    if is_dense(parameter):
        return flat.as_strided(parameter.shape, parameter.stride())
    return flat.view(parameter.shape)


def is_dense(parameter: Tensor) -> bool:
    """Whether the strides fill the parameter's memory without gaps or overlaps, in any order of dimensions.

    >>> is_dense(torch.zeros(2, 3).t()), is_dense(torch.zeros(2, 3)[:, :2])
    (True, False)
    """
    expected = 1
    for size, stride in sorted(zip(parameter.shape, parameter.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

"""One vector an iteration: gradients and a tail of small values, summed over the processes (paper §3, §4).

The vector is cut into buckets fixed by the parameters' order, last parameters first as backward reaches them. Each
bucket is reduced as soon as its gradients are complete, while backward goes on (§4). The sum is all there is: the loss
was divided by kn before, so the summed gradient is the minibatch's mean (Remark 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onehour.dist.group import Group

__all__ = ["Reducer"]

BUCKET_BYTES = 25 * 2**20


class Reducer:
    """Owns the vector; every parameter's `.grad` is a view of it.

    An iteration: `zero()`, one backward a pass with `arm()` before the last one, `finish()`.

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
    >>> reducer.vector
    tensor([3., 3., 0.])
    """

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
        gradients = sum(p.numel() for p in parameters)
        self.vector = self.parameters[0].new_zeros(gradients + tail)
        self.tail = self.vector[gradients:]
        self.used = [False] * len(self.parameters)
        self._armed = False
        self._lay_out(bucket_bytes)
        self._handles = [
            p.register_post_accumulate_grad_hook(partial(self._arrived, number))
            for number, p in enumerate(self.parameters)
        ]

    def _lay_out(self, bucket_bytes: int) -> None:
        self._views, self._bucket_of, self.buckets, self._waits_for = [], [], [], []
        start = offset = waits = 0
        for p in self.parameters:
            # The parameter's own strides, so that channels_last gradients are accumulated without a transpose.
            flat = self.vector[offset : offset + p.numel()]
            self._views.append(flat.as_strided(p.shape, p.stride()) if _dense(p) else flat.view(p.shape))
            self._bucket_of.append(len(self.buckets))
            offset += p.numel()
            waits += 1
            if (offset - start) * p.element_size() >= bucket_bytes:
                self.buckets.append(self.vector[start:offset])
                self._waits_for.append(waits)
                start, waits = offset, 0
        self.buckets.append(self.vector[start:])  # the last bucket takes the tail along, and waits for `finish`
        self._waits_for.append(-1)

    def zero(self) -> None:
        """Begin an iteration: the vector is zero, and every `.grad` a view of it.

        >>> Reducer([nn.Parameter(torch.ones(2))], tail=0, group=Group()).zero()
        """
        self.vector.zero_()
        self._armed = False
        self._missing = list(self._waits_for)
        self._work: list[dist.Work] = []
        for number, (p, view) in enumerate(zip(self.parameters, self._views, strict=True)):
            self.used[number] = False
            if p.grad is not view:
                p.grad = view

    def arm(self) -> None:
        """Say that the next backward is the iteration's last: its gradients are complete as they arrive.

        >>> Reducer([nn.Parameter(torch.ones(2))], tail=0, group=Group()).arm()
        """
        self._armed = True

    def finish(self) -> None:
        """Reduce what is left, the tail with it, and wait: the vector is then the sum over all processes.

        >>> reducer = Reducer([nn.Parameter(torch.ones(2))], tail=0, group=Group())
        >>> reducer.zero(); reducer.finish()
        """
        if self.group.size == 1:
            return
        for number in range(len(self._work), len(self.buckets)):
            self._launch(number)
        for work in self._work:
            work.wait()

    def close(self) -> None:
        """Take the hooks off the parameters.

        >>> Reducer([nn.Parameter(torch.ones(2))], tail=0, group=Group()).close()
        """
        for handle in self._handles:
            handle.remove()

    def _arrived(self, number: int, parameter: Tensor) -> None:
        self.used[number] = True
        if not self._armed or self.group.size == 1:
            return
        self._missing[self._bucket_of[number]] -= 1
        # In order: collectives must be launched alike on every process, whatever order gradients arrive in.
        while len(self._work) < len(self.buckets) - 1 and self._missing[len(self._work)] == 0:
            self._launch(len(self._work))

    def _launch(self, number: int) -> None:
        work = dist.all_reduce(self.buckets[number], op=dist.ReduceOp.SUM, async_op=True)
        assert work is not None
        self._work.append(work)


def _dense(parameter: Tensor) -> bool:
    """Whether the strides fill the parameter's memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for size, stride in sorted(zip(parameter.shape, parameter.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True

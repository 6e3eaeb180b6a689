"""The state of one iteration, while it is written and training goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["Snapshot"]


class Snapshot:
    """Tensors as they are now: read where they lie until `detach`, which copies what nobody has read yet.

    Between two updates no weight and no velocity changes. So whoever writes them needs no copy if it is done before the
    next update, and otherwise a copy of the rest.

    Args:
        tensors: by name, in CPU memory; perhaps training's own.

    >>> import torch
    >>> weight = torch.ones(2)
    >>> snapshot = Snapshot({"weight": weight})
    >>> snapshot.detach()
    >>> _ = weight.zero_()
    >>> with snapshot.reading("weight") as tensor:
    ...     tensor.tolist()
    [1.0, 1.0]
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
        """Tensors without memory: names, shapes and types, which never change."""
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._left: dict[str, Tensor] = dict(tensors)
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, name: str) -> Iterator[Tensor]:
        """A tensor, once; nobody changes it meanwhile."""
        with self._lock:
            yield self._left.pop(name)

    def detach(self) -> None:
        """Call this before the tensors change: waits for the one that is being read, and copies those that were not."""
        with self._lock:  # even if none is left: the last one may be in somebody's hands
            self._left = {name: tensor.clone() for name, tensor in self._left.items()}

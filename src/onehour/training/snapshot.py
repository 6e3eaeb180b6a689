"""The state of one iteration, while it is written and training goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from torch import Tensor

__all__ = ["Snapshot"]

PIECE = 2**22
"""Bytes that are copied at once: what an update may have to wait for."""


class Snapshot:
    """Tensors as they are now: read where they lie until `detach`, which copies what nobody has read yet.

    Between two updates no weight and no velocity changes. So whoever writes them needs no second copy of all of them if
    it is done before the next update, and otherwise one of the rest. An update waits for memory, never for a disk.

    Args:
        tensors: by name, contiguous, in CPU memory; perhaps training's own.

    >>> import torch
    >>> weight = torch.ones(2)
    >>> snapshot = Snapshot({"weight": weight})
    >>> snapshot.detach()
    >>> _ = weight.zero_()
    >>> [piece.tolist() for piece in snapshot.pieces("weight")]
    [[1.0, 1.0]]
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.shapes = {name: tensor.detach().to("meta") for name, tensor in tensors.items()}
        """Tensors without memory: names, shapes and types, which never change."""
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self._left: dict[str, Tensor] = dict(tensors)
        self._ours = False
        self._lock = threading.Lock()

    def pieces(self, name: str, size: int = PIECE) -> Iterator[Tensor]:
        """A tensor's elements in order, once, as flat tensors of `size` bytes that nobody changes.

        >>> import torch
        >>> [piece.tolist() for piece in Snapshot({"a": torch.arange(3)}).pieces("a", size=16)]
        [[0, 1], [2]]
        """
        shape = self.shapes[name]
        count = max(1, size // shape.element_size())
        for first in range(0, shape.numel(), count):
            with self._lock:
                piece = self._left[name].reshape(-1)[first : first + count]
                piece = piece if self._ours else piece.clone()
            yield piece
        with self._lock:
            del self._left[name]

    def detach(self) -> None:
        """Call this before the tensors change: copies those that were not read to their end."""
        with self._lock:
            if not self._ours:
                self._left = {name: tensor.clone() for name, tensor in self._left.items()}
                self._ours = True

"""Which images there are: names, labels and sizes of one side as arrays, never as a million Python objects."""

from __future__ import annotations

import os
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from onehour.data.faults import FaultError

__all__ = ["Names", "Table"]


class Names:
    """Many short texts in two arrays, `buffer` and `ends`: a million cost their bytes.

    >>> names = Names.of(["a.jpg", "b.jpg"])
    >>> len(names), names[1]
    (2, 'b.jpg')
    """

    def __init__(self, buffer: np.ndarray, ends: np.ndarray) -> None:
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Pack names.

        >>> Names.of([]).ends.tolist()
        [0]
        """
        buffer, ends = bytearray(), array("q", [0])
        for name in names:
            buffer += os.fsencode(name)
            ends.append(len(buffer))
        return cls(np.frombuffer(bytes(buffer), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.buffer[self.ends[index] : self.ends[index + 1]].tobytes())

    def safe(self) -> bool:
        """Whether every text is the name of a file in some folder: not empty, no path, neither "." nor "..".

        >>> Names.of(["a.jpg"]).safe(), Names.of(["../a.jpg"]).safe()
        (True, False)
        """
        if len(self.ends) == 0 or self.ends[0] != 0 or self.ends[-1] != len(self.buffer):
            return False
        lengths = np.diff(self.ends)
        if (lengths < 1).any() or (self.buffer == ord("/")).any() or (self.buffer == 0).any():
            return False
        return not any(self[int(index)] in (".", "..") for index in np.flatnonzero(lengths <= 2))


@dataclass(frozen=True)
class Table:
    """The images of one side, training or validation.

    Args:
        classes: their names; a label is a place in this list.
        labels: int32 (N,).
        names: N names of files, without the class's folder.
        sizes: int64 (N,), bytes of each file; None where they were not asked for.
        checks: uint32 (N,), CRC-32 of each file; None likewise.

    >>> table = Table(["cat"], np.zeros(1, np.int32), Names.of(["1.jpg"]), np.array([3]), None)
    >>> table.where(0), len(table)
    ('cat/1.jpg', 1)
    """

    classes: list[str]
    labels: np.ndarray
    names: Names
    sizes: np.ndarray | None
    checks: np.ndarray | None

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        """CLASS/NAME of image `index`."""
        return f"{self.classes[self.labels[index]]}/{self.names[index]}"

    def verify(self, index: int, data: bytes, name: Callable[[int], str]) -> bytes:
        """`data` itself, if it has the size and the CRC-32 that are known of image `index`.

        Args:
            name: where an image lies, for the message.

        Raises:
            FaultError: if it is other data.

        >>> table = Table(["cat"], np.zeros(1, np.int32), Names.of(["1.jpg"]), np.array([3]), None)
        >>> table.verify(0, b"abc", table.where)
        b'abc'
        """
        if self.sizes is not None and len(data) != self.sizes[index]:
            problem = f"has {len(data):,} bytes, {self.sizes[index]:,} when it was indexed"
        elif self.checks is not None and zlib.crc32(data) != self.checks[index]:
            problem = "has other bytes than when it was indexed: its CRC-32 differs"
        else:
            return data
        raise FaultError(name(index), problem, "restore it, or index or pack the data again")

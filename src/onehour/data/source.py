"""Where the bytes of labelled images come from: a folder's files here, a pack's shards in shards.py."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onehour.data.faults import FaultError
from onehour.data.table import Table

__all__ = ["Folder", "Source", "read_file"]

LARGEST = 2**30
"""Bytes of a file that are read at most."""


class Source(Protocol):
    """One side of labelled images; cheap to send to other processes where it comes from an index."""

    classes: list[str]
    labels: np.ndarray
    """Of each image, the index of its class."""

    def name(self, index: int) -> str:
        """Where image `index` lies, for messages."""
        ...

    def read(self, index: int) -> bytes:
        """The file of image `index`; FaultError if it cannot be read, or is not as its index knows it."""
        ...


class Folder:
    """The files ROOT/CLASS/NAME of a table.

    Args:
        root: the side's folder.
        table: its images.
        reopen: gives this same folder in another process, in place of sending all its names.

    >>> import tempfile
    >>> from onehour.data.listing import list_side
    >>> with tempfile.TemporaryDirectory() as root:
    ...     (Path(root) / "cat").mkdir()
    ...     _ = (Path(root) / "cat" / "1.jpg").write_bytes(b"bytes")
    ...     Folder(Path(root), list_side(Path(root), print)).read(0)
    b'bytes'
    """

    resized: int | None = None
    """Files are as they are; a pack's may be smaller."""

    def __init__(self, root: Path, table: Table, reopen: Callable[[], Folder] | None = None) -> None:
        self.root, self.table, self.reopen = str(root), table, reopen
        self.classes, self.labels = table.classes, table.labels

    def __reduce__(self) -> tuple[Any, ...]:
        return (self.reopen, ()) if self.reopen else (Folder, (Path(self.root), self.table))

    def name(self, index: int) -> str:
        """The path of image `index`."""
        return os.path.join(self.root, self.table.where(index))

    def read(self, index: int) -> bytes:
        """The bytes of image `index`.

        Raises:
            FaultError: naming the file, if it cannot be read or is not as its index knows it.
        """
        return self.table.verify(index, read_file(self.name(index)), self.name)


def read_file(path: str) -> bytes:
    """All bytes of a plain file.

    Raises:
        FaultError: naming it, if it cannot be read, is no plain file, or is larger than any image.

    >>> read_file("nowhere.jpg")
    Traceback (most recent call last):
    onehour.data.faults.FaultError: nowhere.jpg cannot be read: No such file or directory; restore or remove it
    """
    try:
        # Without O_NONBLOCK, opening a pipe that took the file's place would wait for ever.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise FaultError(path, "is no plain file", "restore it, or move it away")
            if status.st_size > LARGEST:
                raise FaultError(path, f"has {status.st_size:,} bytes, too many for an image", "replace or remove it")
            data = os.read(file, status.st_size)
            while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
                data += more
            return data
        finally:
            os.close(file)
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
        raise FaultError(path, problem, "restore or remove it") from error

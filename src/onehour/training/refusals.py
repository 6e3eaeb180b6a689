"""What a device or a disk refuses in the middle of a run, in words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onehour.training.memory import less_memory, out_of_memory

__all__ = ["in_words"]

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a disk says that takes nothing."""


@contextmanager
def in_words(folder: Path, per_pass: int = 1) -> Iterator[None]:
    """Turn such errors into one message each.

    Args:
        folder: the run's.
        per_pass: workers that share a forward pass.

    Raises:
        ValueError: in place of them.

    >>> with in_words(Path("runs/mine")):
    ...     raise OSError(errno.EROFS, "Read-only file system")
    Traceback (most recent call last):
    ValueError: runs/mine cannot be written: Read-only file system; the same command goes on once it can
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(less_memory(per_pass)) from error
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise ValueError(
            f"{folder} cannot be written: {error.strerror}; the same command goes on once it can"
        ) from error

"""What goes wrong in the middle of a run, in words for a person."""

from __future__ import annotations

import errno
from pathlib import Path

from onehour.train.memory import less_memory, out_of_memory
from onehour.train.owned import Owned

__all__ = ["in_words"]

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a disk says that takes nothing."""


def in_words(error: Exception, folder: Path, *, per_pass: int = 1, owned: Owned | None = None) -> ValueError | None:
    """An error of the machine or the data, as a message that says what to do; None for one that is a fault of the code.

    Args:
        folder: the run's.
        per_pass: workers that share a forward pass.
        owned: tells what became of the folder, once the run has it.

    >>> str(in_words(OSError(errno.EROFS, "Read-only file system"), Path("runs/a")))
    'runs/a cannot be written: Read-only file system; the same command goes on once it can'
    """
    if isinstance(error, MemoryError | RuntimeError) and out_of_memory(error):
        return ValueError(less_memory(per_pass))
    if isinstance(error, OSError):
        if owned is not None and not owned.look() and owned.lost is not None:
            return owned.lost
        if error.errno in REFUSALS:
            return ValueError(f"{folder} cannot be written: {error.strerror}; the same command goes on once it can")
    if isinstance(error, IndexError) and "Target" in str(error):  # what cross_entropy raises for such a label
        return ValueError(
            f"a label of the training data lies outside the model's classes ({error}); labels must be 0 … C − 1"
        )
    return None

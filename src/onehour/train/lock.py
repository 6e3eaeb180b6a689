"""One writer a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

__all__ = ["FolderLock"]

NAME = ".lock"
PATIENCE = 10.0
"""Seconds to wait for a process that is about to end, such as one whose launcher was killed."""


class FolderLock:
    """Held from construction to `release`, against every other process that asks.

    A POSIX record lock: the kernel drops it when the process ends, and processes that it forks do not have it.

    Args:
        folder: made if it is not there.
        patience: seconds to wait for another holder.

    Raises:
        ValueError: if another process holds it still, naming that process.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     FolderLock(Path(folder)).release()
    """

    def __init__(self, folder: Path, *, patience: float = PATIENCE) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(f"{folder / NAME} cannot be opened: {error.strerror}; remove it") from error
        deadline = time.monotonic() + patience
        while not self._taken():
            if time.monotonic() > deadline:
                holder = os.pread(self._file, 200, 0).decode(errors="replace").strip()
                os.close(self._file)
                raise ValueError(
                    f"{folder} is being written by another process{f' ({holder})' if holder else ''}; wait for it, end"
                    " it, or choose another --out"
                )
            time.sleep(0.1)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have it."""
        os.close(self._file)

    def _taken(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

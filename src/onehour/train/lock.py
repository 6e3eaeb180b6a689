"""One writer a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
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
        ValueError: if another process holds it still, naming that process, or the file system gives no locks.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     FolderLock(Path(folder)).release()
    """

    def __init__(self, folder: Path, *, patience: float = PATIENCE) -> None:
        self._path = folder / NAME
        self._open()
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
            if self._is_elsewhere():  # somebody's --fresh has moved the folder aside
                os.close(self._file)
                self._open()
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have it."""
        os.close(self._file)

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ValueError(f"{self._path} cannot be opened: {error.strerror}; remove it") from error

    def _taken(self) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            os.close(self._file)
            raise ValueError(
                f"{self._path} cannot be locked: {error.strerror}; give --out on a file system that has locks"
            ) from error
        return not self._is_elsewhere()

    def _is_elsewhere(self) -> bool:
        """Whether the file that is open has lost its name, and so guards nothing."""
        with suppress(OSError):
            return not os.path.samestat(os.fstat(self._file), os.lstat(self._path))
        return True

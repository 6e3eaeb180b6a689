"""One writer a folder: who holds its lock writes that very folder, whatever its name becomes, and notices when it does.

The lock is that of an open file, not of a process (F_OFD_SETLK; flock where the system has none). So whoever else in
the process opens and closes `.lock` does not drop it, programs that the process starts do not have it, and what Python
forks lets go of it at once: it ends with its holder, however that ends. It and an earlier version's exclude each other.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
import threading
import time
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Self

from onehour.files import LOCK, lock, open_inside, opened

PATIENCE = 10.0
"""Seconds to wait for a process that is about to end, such as one whose launcher was killed."""
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
"""What is said of a name that leads nowhere; another error may be gone the next time."""


class FolderLostError(ValueError):
    """A folder has lost its name, or its lock, while this process wrote it.

    Args:
        now: where it is, and may still be written through its descriptor; None where nothing may.
    """

    def __init__(self, text: str, remedy: str = "", now: Path | None = None) -> None:
        super().__init__("; ".join(part for part in (text, remedy) if part))
        self.text, self.remedy, self.now = text, remedy, now

    def ended(self, how: str) -> str:
        """The message, with how what wrote it has ended."""
        return "; ".join((self.text, how, self.remedy))


class OpenFolder:
    """A folder that is held open: what is written through it stays in it, whoever has its name by then.

    Args:
        make: it, and those above, if it is not there; their names are on disk then.
        option: of the command, that names it.
    """

    def __init__(self, path: Path, *, make: bool = False, option: str = "--out") -> None:
        self.path, self.option = path, option
        self._named = Path(os.path.abspath(path))  # whoever changes the working directory later
        with opened(self._named, make=make) as folder:
            self.descriptor = os.dup(folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        os.close(self.descriptor)

    @property
    def inside(self) -> Path:
        """A path to the folder itself, whatever its name; its name where the system has no such paths."""
        link = Path(f"/proc/self/fd/{self.descriptor}")
        return link if link.is_dir() else self.path

    def check(self) -> None:
        """See whether the folder has its name still; if not, a FolderLostError says what became of it.

        A disk that does not answer says nothing of that.
        """
        try:
            here = os.fstat(self.descriptor)
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise self._removed() from error
            return
        try:
            there = os.stat(self._named)
        except OSError as error:
            if error.errno in GONE:
                raise self._lost(here) from error
            return
        if not os.path.samestat(here, there):
            raise self._lost(here)

    def _lost(self, here: os.stat_result) -> FolderLostError:
        link = f"/proc/self/fd/{self.descriptor}"
        with suppress(OSError):
            now = Path(os.readlink(link))
            if os.path.samestat(here, os.stat(now)):
                text = f"{self.path} was moved to {now} while it was being written"
                return FolderLostError(
                    text, f"the same command with {self.option} {shlex.quote(str(now))} goes on", now
                )
        with suppress(OSError):
            if here.st_nlink == 0 or os.readlink(link).endswith(" (deleted)"):
                return self._removed()
        text = f"{self.path} is no longer the folder that was being written"
        return FolderLostError(text, f"the same command goes on where {self.option} names that one")

    def _removed(self) -> FolderLostError:
        text = f"{self.path} was removed, or moved to another disk, while it was being written"
        return FolderLostError(
            text, f"the same command goes on where {self.option} names a copy of it, else begins anew"
        )


class HeldFolder(OpenFolder):
    """A folder that no other process writes, from construction to `release`.

    It may be handed to a process that multiprocessing spawns: the lock then ends with the last one that has it.

    Raises:
        ValueError: if another process holds it still, naming that process, or the file system gives no locks.
    """

    def __init__(self, path: Path, *, patience: float = PATIENCE, option: str = "--out") -> None:
        self._lent = False
        deadline = time.monotonic() + patience
        while True:
            super().__init__(path, make=True, option=option)
            try:
                with _opening:
                    self._lock = open_inside(self.descriptor, LOCK, os.O_RDWR | os.O_CREAT)
                    _held.add(self)
                if self._is_taken() and self._is_there():
                    break
                if time.monotonic() > deadline:
                    raise self._refusal()
            except BaseException:
                self.release()
                raise
            self.release()  # somebody's --fresh may have moved the folder aside
            time.sleep(0.1)
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __getstate__(self) -> dict[str, Any]:
        self._lent = True
        return vars(self) | {"descriptor": DupFd(self.descriptor), "_lock": DupFd(self._lock)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.descriptor, self._lock = (state[name].detach() for name in ("descriptor", "_lock"))
        for descriptor in (self.descriptor, self._lock):
            os.set_inheritable(descriptor, False)  # programs that it starts do not have them
        _held.add(self)

    def release(self) -> None:
        super().release()
        if self in _held and not self._lent:  # else what is just forked would have it a moment longer
            with suppress(OSError):
                lock(self._lock, let_go=True)
        self.forget()

    def forget(self) -> None:
        """Have the lock no longer in this process; others that have it keep it."""
        if self in _held:
            _held.remove(self)
            os.close(self._lock)

    def check(self) -> None:
        """As `OpenFolder.check`; and whether the lock is still the folder's."""
        super().check()
        try:
            guarded = self not in _held or self._is_there()
        except OSError:
            return
        if not guarded:
            raise FolderLostError(
                f"{self.path / LOCK} was removed while {self.path} was being written, so another process may write it",
                "the same command goes on from what was saved before",
            )

    def _is_taken(self) -> bool:
        try:
            lock(self._lock)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise ValueError(
                f"{self.path / LOCK} cannot be locked: {error.strerror}; give {self.option} on a file system that has"
                " locks"
            ) from error
        return True

    def _is_there(self) -> bool:
        """Whether the file that is locked has its name still, in the folder of that name; else it guards nothing."""
        with suppress(FileNotFoundError, NotADirectoryError):
            own = os.stat(LOCK, dir_fd=self.descriptor, follow_symlinks=False)
            named = os.stat(self._named)
            return os.path.samestat(os.fstat(self._lock), own) and os.path.samestat(os.fstat(self.descriptor), named)
        return False

    def _refusal(self) -> ValueError:
        holder = os.pread(self._lock, 200, 0).decode(errors="replace").strip()
        return ValueError(
            f"{self.path} is being written by another process{f' ({holder})' if holder else ''}; wait for it, end it,"
            f" or choose another {self.option}"
        )


_held: set[HeldFolder] = set()
"""All whose lock this process has."""
_opening = threading.RLock()
"""Nobody forks between the opening of a lock's file and its place in `_held`."""


def _let_go() -> None:
    """In what was forked from this process: an open file's lock would last as long as the last one that has it open."""
    for folder in list(_held):
        folder.forget()
    _opening.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_let_go)

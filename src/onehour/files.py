"""What this project writes: whole files and appends, in a folder that no link leads out of.

A folder that a person names may be reached through links, as that person wishes. What lies inside it may have come with
it, from anywhere: there no link is followed, be it a file or a folder, and a name is never a path.

All raise ValueError for a link, a pipe or a name that is none, and OSError where the disk refuses.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from onehour.leaving import before_leaving

Folder = Path | int
"""A folder by its name, or a descriptor of it that is held open."""

ASIDE, LOCK = ".writing", ".lock"
"""A folder's folder for files that have no place yet, and the file in it whose lock its writer has."""


@contextmanager
def opened(folder: Folder, inside: str = "", *, make: bool = False) -> Generator[int]:
    """A descriptor of a folder, or of one inside it to which no link leads.

    Args:
        inside: names of folders with slashes between them; empty for the folder itself.
        make: make those that are not there; their names are on disk then.
    """
    if isinstance(folder, int):
        held = os.dup(folder)
    else:
        if make:
            make_folder(folder)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        shown = Path(_shown(folder, ""))
        for part in _parts(folder, inside) if inside else ():
            shown /= part
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=held)
                    os.fsync(held)
            inner = _open(held, part, os.O_RDONLY | os.O_DIRECTORY, shown)
            outer, held = held, inner
            os.close(outer)
        yield held
    finally:
        os.close(held)


def open_inside(folder: Folder, name: str, flags: int) -> int:
    """As os.open with O_CLOEXEC, for a regular file inside a folder, which no link leads to and no pipe stands for."""
    with _place(folder, name) as (held, last):
        return _open(held, last, flags, _shown(folder, name))


@contextmanager
def written(folder: Folder, name: str, *, check: Callable[[Path], None] | None = None) -> Generator[BinaryIO]:
    """A file to write that gets its name, in place of what had it, once it is on disk and everything went well.

    Only one process at a time may do so under one name. Several files that belong together are for `replace_all`.

    Args:
        name: of the file; folders before it are there already.
        check: is given the whole file by the name that it has until then; what it raises leaves the old file in place.
    """
    with ExitStack() as stack:
        held, last = stack.enter_context(_place(folder, name))
        temporary = f".{last}.writing"
        remove(held, temporary)  # a killed process left it, or it leads elsewhere
        stack.enter_context(before_leaving(lambda: remove(held, temporary)))
        try:
            with os.fdopen(_new(held, temporary), "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if check is not None:
                check(_shown(held, temporary))
            os.rename(temporary, last, src_dir_fd=held, dst_dir_fd=held)
        except BaseException as error:
            if isinstance(error, OSError):
                error.filename = str(_shown(folder, name))
            with suppress(OSError):
                remove(held, temporary)
            raise
        os.fsync(held)


@contextmanager
def written_at(path: Path, *, check: Callable[[Path], None] | None = None) -> Generator[BinaryIO]:
    """As `written`, for a file that a person names: the one behind a link, and a device or a pipe as it is.

    Args:
        check: as of `written`; what goes into a device or a pipe is whole and checked before.
    """
    if not is_written_into(path):
        behind = Path(os.path.realpath(path))
        make_folder(behind.parent)
        with written(behind.parent, behind.name, check=check) as file:
            yield file
    elif check is None:
        with _receiving(path) as file:
            yield file
    else:
        with tempfile.TemporaryDirectory() as folder:
            with written(Path(folder), "whole", check=check) as file:
                yield file
            with Path(folder, "whole").open("rb") as whole, _receiving(path) as file:
                shutil.copyfileobj(whole, file)


def is_written_into(path: Path) -> bool:
    """Whether a path is a device or a pipe, or what standard output or error goes to, which nothing may replace."""
    with suppress(OSError):
        mode = os.stat(path).st_mode
        return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or _standard(path) is not None
    return False


def _standard(path: Path) -> int | None:
    """The descriptor of standard output or error that goes where a path leads."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    return None


def _receiving(path: Path) -> BinaryIO:
    """A file of a shell's is written where the shell goes on behind it."""
    descriptor = _standard(path)
    return path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


def replace_whole(folder: Folder, name: str, content: str | bytes) -> None:
    """As `written`, for a content that there is."""
    with written(folder, name) as file:
        file.write(_bytes(content))


def replace_all(folder: Folder, files: Mapping[str, str | bytes], *, gone: Iterable[str] = ()) -> None:
    """Write several files that belong together: all of them, or none.

    All are on disk under other names before the first gets its own; where that fails, those before it are put back.

    Args:
        files: contents by name; folders before a name are made.
        gone: names that are to be there no longer.
    """
    with opened(folder, make=True) as held, _aside(held) as aside:
        new = {name: f"new-{number}" for number, name in enumerate(files)}
        for name, content in files.items():
            write_new(new[name], [_bytes(content)], folder=aside)
        os.fsync(aside)
        done: list[str] = []
        try:
            # What is gone goes first: a killed process leaves nothing then that the next one cannot know of.
            for name in (*gone, *files):
                with _place(held, name, make=name in files) as (place, last):
                    _keep(place, last, aside, f"old-{len(done)}")
                    done.append(name)
                    if name in files:
                        os.rename(new[name], last, src_dir_fd=aside, dst_dir_fd=place)
                    else:
                        remove(place, last)
            for above in {name.rpartition("/")[0] for name in done}:
                with opened(held, above) as place:
                    os.fsync(place)
        except BaseException:
            for number, name in enumerate(done):
                with suppress(OSError), _place(held, name) as (place, last):
                    try:
                        os.rename(f"old-{number}", last, src_dir_fd=aside, dst_dir_fd=place)
                    except FileNotFoundError:  # there was none
                        remove(place, last)
            raise


def write_new(path: str | Path, parts: Iterable[bytes | memoryview], *, folder: int | None = None) -> None:
    """Write a new file, on disk when this returns: neither through a link that is there, nor what somebody reads."""
    file = _new(folder, path)
    try:
        for part in parts:
            _write(file, part)
        os.fsync(file)
    finally:
        os.close(file)


def append_whole(folder: Folder, name: str, content: bytes, *, behind: int | None = None) -> None:
    """Append to a file, behind so many of its bytes or all; what a full disk takes of it is cut off again."""
    file = open_inside(folder, name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        size = os.fstat(file).st_size if behind is None else behind
        os.ftruncate(file, size)
        try:
            _write(file, content)
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def remove(folder: Folder, name: str) -> None:
    """Remove a file, a link, or a folder with all that is in it, if it is there; what a link leads to stays."""
    with _place(folder, name) as (held, last), suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(last, dir_fd=held, follow_symlinks=False).st_mode):
            shutil.rmtree(last, dir_fd=held)
        else:
            os.unlink(last, dir_fd=held)


def sync_folder(path: Path) -> None:
    """Bring a folder's own entries to disk; a file's content in the same way."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: int, *, wait: bool = False, let_go: bool = False) -> None:
    """Lock an open file, or let go of it in all processes that have it open; EACCES or EAGAIN if another has it."""
    import fcntl  # here: who only reads needs no system that has it

    if sys.platform == "linux":  # as NFS has them too, and earlier versions' record locks
        kind = fcntl.F_UNLCK if let_go else fcntl.F_WRLCK
        how = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
        fcntl.fcntl(file, how, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))
    else:
        fcntl.flock(file, fcntl.LOCK_UN if let_go else fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _new(folder: int | None, name: str | Path) -> int:
    """Neither a link that somebody left there, nor a file that somebody reads."""
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def _write(file: int, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]


@contextmanager
def _aside(folder: int) -> Generator[int]:
    """A folder in a folder for what has no place yet, or no longer; for one process at a time."""
    while True:
        with suppress(FileExistsError):
            os.mkdir(ASIDE, 0o700, dir_fd=folder)
        with suppress(FileNotFoundError):
            file = open_inside(folder, f"{ASIDE}/{LOCK}", os.O_RDWR | os.O_CREAT)
            lock(file, wait=True)
            if os.fstat(file).st_nlink:
                break
            os.close(file)  # who had it has removed it
    try:
        with opened(folder, ASIDE) as held:
            for name in {*os.listdir(held)} - {LOCK}:  # a killed process left them
                remove(held, name)
            yield held
    finally:
        with suppress(OSError):
            remove(folder, ASIDE)
        os.close(file)


def _keep(folder: int, name: str, aside: int, old: str) -> None:
    """Give a file, if there is one, another name too, so that it can be put back."""
    options: Any = {"src_dir_fd": folder, "dst_dir_fd": aside}
    with suppress(FileNotFoundError):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise ValueError(
                f"{_shown(folder, name)} is a folder, and a file is to be written there; move it elsewhere"
            )
        try:
            os.link(name, old, **options, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            os.rename(name, old, **options)  # a file system without second names


@contextmanager
def _place(folder: Folder, name: str, *, make: bool = False) -> Generator[tuple[int, str]]:
    """The folder that a file is in, and its name there."""
    *above, last = _parts(folder, name)
    with opened(folder, "/".join(above), make=make) as held:
        yield held, last


def make_folder(folder: Path) -> None:
    """A folder and those above it, as `mkdir -p`; what is made has its name on disk."""
    missing: list[Path] = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
        sync_folder(made.parent)


def _open(held: int, name: str, flags: int, shown: Path) -> int:
    """Open a regular file, or with O_DIRECTORY a folder, and follow no link, whoever puts one there meanwhile."""
    expected, is_expected = "regular file", stat.S_ISREG
    if flags & os.O_DIRECTORY:
        expected, is_expected = "folder", stat.S_ISDIR
    with suppress(FileNotFoundError):
        mode = os.stat(name, dir_fd=held, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            raise ValueError(f"{shown} is a link, and what is written into a folder stays in it; remove it")
        if not is_expected(mode):
            raise ValueError(f"{shown} is not a {expected}; remove it")
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=held)


def _parts(folder: Folder, name: str) -> list[str]:
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"{name!r} cannot name a file in {_shown(folder, '')}")
    return parts


def _shown(folder: Folder, name: str) -> Path:
    if isinstance(folder, int):
        link = Path(f"/proc/self/fd/{folder}")
        folder = link.readlink() if link.is_symlink() else Path()  # where there is no /proc, the name alone
    return folder / name


def to_json(content: Any, *, indent: int | None = None) -> str:
    """JSON of plain values, as every reader of JSON takes it: a number that is not finite is null.

    >>> to_json({"loss": float("nan"), "η": 0.1})
    '{"loss": null, "η": 0.1}'
    """
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in cast("dict[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in cast("list[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value

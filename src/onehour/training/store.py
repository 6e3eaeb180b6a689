"""A run's checkpoints on disk: each whole under its name or not there, verified before use, thinned with care."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onehour.files import sync_folder
from onehour.training.manifest import read_manifest, read_plain, write_manifest

__all__ = ["CHECKPOINTS", "Store", "Stored", "checkpoint_folders"]

CHECKPOINTS = "checkpoints"
NAME = re.compile(r"iteration-(\d{9,18})", re.ASCII)
WRITING, DROPPING, REPLACED = ".writing-", ".dropping-", ".replaced-"
"""What the names of folders begin with that are not checkpoints yet, no longer, or until another has their name."""
DAMAGED = ".damaged-"
"""And of those that a run has passed over: kept until it has saved their iteration, or a later one, again."""

Write = Callable[[Path], dict[str, Any]]
"""Writes a file that is on disk when it returns; gives {"bytes": …, "sha256": …} and, of tensors, "finite"."""


@dataclass(frozen=True)
class Stored:
    """A verified checkpoint.

    Args:
        iteration: after which it was taken.
        finite: whether all its numbers are.
        contents: the bytes of each file, those whose digest was compared.

    >>> Stored(7, True, {}).iteration
    7
    """

    iteration: int
    finite: bool
    contents: dict[str, bytes]


class Store:
    """The checkpoints of one run.

    A checkpoint is a folder of files and a manifest of their sizes and digests, which has a digest itself. It is
    written under another name, brought to disk, and renamed; so what has its name is whole, unless the disk changed it
    later. It loses that name before it is deleted. "Newest" is computed from names and contents each time, never
    written down.

    Args:
        folder: the run's.
        recipe: its digest; a checkpoint of another recipe is none of this run's.
        kept: how many verified ones stay when it is thinned.
        needs: files without which a folder is no checkpoint.
        shown: the run's folder in messages, where `folder` is another path to it.

    >>> Store(Path("nowhere"), recipe="").newest() is None
    True
    """

    def __init__(
        self, folder: Path, *, recipe: str, kept: int = 2, needs: Collection[str] = (), shown: Path | None = None
    ) -> None:
        self.folder, self.shown = folder / CHECKPOINTS, (shown or folder) / CHECKPOINTS
        self.recipe, self.kept, self.needs = recipe, kept, frozenset(needs)
        self.problems: list[str] = []
        """What was wrong with newer checkpoints than the one that `newest` gave."""
        self._passed_over: list[Path] = []
        self._known: dict[str, tuple[Any, bool | None]] = {}
        """Looked at in this process: files' sizes and times, and whether all is finite; None if it did not verify."""

    def write(self, iteration: int, files: Mapping[str, Write]) -> Path:
        """Write a checkpoint, and thin the older ones.

        Raises:
            OSError: if the disk refuses; what is left of it then has no checkpoint's name, and the next start, or the
                next write, removes it.

        >>> import tempfile
        >>> from onehour.training.tensorfile import write_bytes
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store(Path(folder), recipe="")
        ...     _ = store.write(7, {"a": lambda path: write_bytes(path, b"state")})
        ...     store.newest()
        Stored(iteration=7, finite=True, contents={'a': b'state'})
        """
        final = self.folder / f"iteration-{iteration:09d}"
        writing, aside = (self.folder / f"{prefix}{final.name}" for prefix in (WRITING, REPLACED))
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        self.clear_leftovers()
        try:
            writing.mkdir()
            written = {name: write(writing / name) for name, write in files.items()}
            finite = all(known.pop("finite", True) for known in written.values())
            write_manifest(writing, iteration=iteration, recipe=self.recipe, finite=finite, files=written)
            sync_folder(writing)
            replaces = _is_there(final)  # the same iteration again: it was damaged, or it is evaluated now
            if replaces:
                final.rename(aside)
            try:
                writing.rename(final)
            except BaseException:
                if replaces:
                    aside.rename(final)
                raise
            sync_folder(self.folder)
        except BaseException:
            _remove(writing)
            raise
        _remove(aside)
        self._known[final.name] = _stamp_of(final), finite
        with suppress(OSError):  # what should go stays for the next time; what was written is written
            self.thin()
            for path in self.folder.iterdir():
                match = NAME.fullmatch(path.name.removeprefix(DAMAGED))
                if path.name.startswith(DAMAGED) and match and int(match[1]) <= iteration:
                    _remove(path)
        return final

    def newest(self) -> Stored | None:
        """The newest checkpoint that verifies; None where there is none at all.

        Raises:
            ValueError: if there are some and none verifies.

        >>> Store(Path("nowhere"), recipe="").newest() is None
        True
        """
        self.problems, self._passed_over = [], []
        try:
            folders = self._folders()
        except OSError as error:
            raise ValueError(f"{self.shown} cannot be listed: {error.strerror}") from error
        for folder in reversed(folders):
            stamp = _stamp_of(folder)
            try:
                stored = self.verified(folder)
            except ValueError as error:
                self.problems.append(f"{folder.name}: {error}")
                self._passed_over.append(folder)
                continue
            self._known[folder.name] = stamp, stored.finite
            return stored
        if self.problems:
            raise ValueError(
                f"no checkpoint in {self.shown} can be trusted ({'; '.join(self.problems)}); start over with --fresh"
            )
        return None

    def set_aside(self) -> None:
        """Take the name from what `newest` passed over; only for who holds the run's lock, and trains.

        The record is cut to the checkpoint that is used. A newer one that could not be read for a moment must not be
        found again behind that cut.

        Raises:
            ValueError: if the disk refuses.

        >>> Store(Path("nowhere"), recipe="").set_aside()
        """
        try:
            for folder in self._passed_over:
                aside = folder.with_name(f"{DAMAGED}{folder.name}")
                _remove(aside)
                folder.rename(aside)
            if self._passed_over:
                sync_folder(self.folder)
        except OSError as error:
            raise ValueError(f"{self.shown} cannot be written: {error.strerror}") from error

    def verified(self, folder: Path) -> Stored:
        """A checkpoint, read once, and compared with its manifest as it was read.

        Raises:
            ValueError: saying what is wrong with it.

        >>> Store(Path("nowhere"), recipe="").verified(Path("nowhere"))
        Traceback (most recent call last):
        ValueError: it has no manifest.json
        """
        manifest = read_manifest(folder)
        match = NAME.fullmatch(folder.name)
        if match is None or int(match[1]) != manifest.iteration:
            raise ValueError(f"its manifest is that of iteration {manifest.iteration}")
        if manifest.recipe != self.recipe:
            raise ValueError("it belongs to a run of another recipe")
        if missing := sorted(self.needs - manifest.files.keys()):
            raise ValueError(f"its manifest has no {', '.join(missing)}")
        contents = {}
        for name, (size, digest) in manifest.files.items():
            content = read_plain(folder / name, size)
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"{name} differs from its digest")
            contents[name] = content
        return Stored(manifest.iteration, manifest.finite, contents)

    def thin(self) -> None:
        """Drop what is older than the last `kept` verified ones, but never the last one that is finite.

        >>> Store(Path("nowhere"), recipe="").thin()
        """
        verified, has_finite = 0, False
        for folder in reversed(self._folders()):
            finite = None if verified >= self.kept and has_finite else self._look(folder)
            # One that cannot be read today may be the last finite one: it stays until another is known to be.
            if verified >= self.kept and (has_finite or finite is False):
                with suppress(OSError):
                    self._drop(folder)
                continue
            verified += finite is not None
            has_finite |= bool(finite)

    def clear_leftovers(self) -> None:
        """Remove what a killed process was writing or removing; only for who holds the run's lock.

        One that was about to be replaced gets its name back.

        >>> Store(Path("nowhere"), recipe="").clear_leftovers()
        """
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            final = path.with_name(path.name.removeprefix(REPLACED))
            if final != path and not _is_there(final):
                path.rename(final)
            elif path.name.startswith((WRITING, DROPPING, REPLACED)):
                _remove(path)

    def _drop(self, folder: Path) -> None:
        """Rename first: what is half deleted must not look like a checkpoint."""
        dropping = self.folder / f"{DROPPING}{folder.name}"
        folder.rename(dropping)
        _remove(dropping)
        self._known.pop(folder.name, None)

    def _look(self, folder: Path) -> bool | None:
        """Whether a checkpoint is finite; None where it cannot be trusted. Read again only if its files changed."""
        stamp = _stamp_of(folder)
        known = self._known.get(folder.name)
        if known is None or known[0] != stamp:
            try:
                known = stamp, self.verified(folder).finite
            except ValueError:
                known = stamp, None
            self._known[folder.name] = known
        return known[1]

    def _folders(self) -> list[Path]:
        return checkpoint_folders(self.folder.parent, self.shown)


def checkpoint_folders(folder: Path, shown: Path | None = None) -> list[Path]:
    """The checkpoints in a run's folder by their names, the newest last.

    Args:
        shown: where they are, in messages.

    Raises:
        ValueError: if a link stands in their place.

    >>> checkpoint_folders(Path("nowhere"))
    []
    """
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_symlink():
        raise ValueError(
            f"{shown or checkpoints} is a link, and what lies behind it is none of the run's; remove it, or give --out"
            " on the disk that it leads to"
        )
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _stamp_of(folder: Path) -> Any:
    """What differs when somebody has changed a file since: sizes and times."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return None
    return sorted((name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found)


def _is_there(path: Path) -> bool:
    """Unlike `exists`, an error of the disk is one."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _remove(path: Path) -> None:
    """A folder and all in it, or a link that somebody put in its place; what refuses stays."""
    with suppress(OSError):
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)

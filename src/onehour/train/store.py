"""A run's checkpoints on disk: each whole under its name or not there, verified before use, thinned with care."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onehour.train.tensorfile import write_bytes

__all__ = ["CHECKPOINTS", "Store", "Stored"]

CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"
FORMAT = 1
NAME = re.compile(r"iteration-(\d{9,})")
LARGEST_MANIFEST = 2**20

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
    later. "Newest" is computed from names and contents each time, never written down.

    Args:
        folder: the run's.
        recipe: its digest; a checkpoint of another recipe is none of this run's.
        kept: how many verified ones stay when it is thinned.

    >>> Store(Path("nowhere"), recipe="").newest() is None
    True
    """

    def __init__(self, folder: Path, *, recipe: str, kept: int = 2) -> None:
        self.folder, self.recipe, self.kept = folder / CHECKPOINTS, recipe, kept
        self.problems: list[str] = []
        """What was wrong with newer checkpoints than the one that `newest` gave."""
        self._known: dict[str, bool] = {}
        """Verified in this process, or written by it: whether finite."""

    def write(self, iteration: int, files: Mapping[str, Write]) -> Path:
        """Write a checkpoint, and thin the older ones.

        Raises:
            OSError: if the disk refuses; nothing is left of it then.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store(Path(folder), recipe="")
        ...     _ = store.write(7, {"a": lambda path: write_bytes(path, b"state")})
        ...     store.newest()
        Stored(iteration=7, finite=True, contents={'a': b'state'})
        """
        final = self.folder / f"iteration-{iteration:09d}"
        writing = self.folder / f".writing-{final.name}"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        try:
            written = {name: write(writing / name) for name, write in files.items()}
            finite = all(known.pop("finite", True) for known in written.values())
            manifest = {
                "format": FORMAT,
                "iteration": iteration,
                "recipe": self.recipe,
                "finite": finite,
                "files": written,
            }
            text = json.dumps(manifest | {"sha256": _digest_of(manifest)}, indent=2)
            write_bytes(writing / MANIFEST, text.encode())
            sync_folder(writing)
            if final.exists():  # the same iteration again, after a resume from one before it
                shutil.rmtree(final)
            writing.rename(final)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)
            raise
        self._known[final.name] = finite
        self.thin()
        return final

    def newest(self) -> Stored | None:
        """The newest checkpoint that verifies; None where there is none at all.

        Raises:
            ValueError: if there are some and none verifies.

        >>> Store(Path("nowhere"), recipe="").newest() is None
        True
        """
        self.problems = []
        for folder in reversed(self._folders()):
            try:
                stored = self.verified(folder)
            except ValueError as error:
                self.problems.append(f"{folder.name}: {error}")
                continue
            self._known[folder.name] = stored.finite
            return stored
        if self.problems:
            raise ValueError(
                f"no checkpoint in {self.folder} can be trusted ({'; '.join(self.problems)}); start over with --fresh"
            )
        return None

    def verified(self, folder: Path) -> Stored:
        """A checkpoint, read once, and compared with its manifest as it was read.

        Raises:
            ValueError: saying what is wrong with it.

        >>> Store(Path("nowhere"), recipe="").verified(Path("nowhere"))
        Traceback (most recent call last):
        ValueError: it has no manifest.json
        """
        manifest = _manifest_of(folder)
        try:
            iteration, recipe, finite = (manifest[key] for key in ("iteration", "recipe", "finite"))
            files = {
                str(name): (int(known["bytes"]), str(known["sha256"])) for name, known in manifest["files"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{MANIFEST} is none of ours") from error
        match = NAME.fullmatch(folder.name)
        if match is None or int(match[1]) != iteration:
            raise ValueError(f"its manifest is that of iteration {iteration}")
        if recipe != self.recipe:
            raise ValueError("it belongs to a run of another recipe")
        contents = {}
        for name, (size, digest) in files.items():
            if Path(name).name != name:
                raise ValueError(f"its manifest names a file outside it, {name!r}")
            content = _read(folder / name, size)
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"{name} differs from its digest")
            contents[name] = content
        return Stored(iteration, finite, contents)

    def thin(self) -> None:
        """Drop what is older than the last `kept` verified ones, but never the last one that is finite.

        >>> Store(Path("nowhere"), recipe="").thin()
        """
        verified, has_finite = 0, False
        for folder in reversed(self._folders()):
            finite = None if verified >= self.kept and has_finite else self._look(folder)
            if verified >= self.kept and (has_finite or not finite):
                shutil.rmtree(folder, ignore_errors=True)
                self._known.pop(folder.name, None)
                continue
            verified += finite is not None
            has_finite |= bool(finite)

    def clear_leftovers(self) -> None:
        """Remove what a killed process was writing; only for who holds the run's lock.

        >>> Store(Path("nowhere"), recipe="").clear_leftovers()
        """
        for writing in self.folder.glob(".writing-*"):
            shutil.rmtree(writing, ignore_errors=True)

    def _look(self, folder: Path) -> bool | None:
        """Whether a checkpoint is finite; None where it cannot be trusted. Read once a process."""
        if folder.name not in self._known:
            try:
                self._known[folder.name] = self.verified(folder).finite
            except ValueError:
                return None
        return self._known[folder.name]

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def sync_folder(path: Path) -> None:
    """Bring a folder's own entries to disk.

    >>> sync_folder(Path("."))
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_of(folder: Path) -> dict[str, Any]:
    try:
        if (folder / MANIFEST).stat().st_size > LARGEST_MANIFEST:
            raise ValueError("its manifest is too large to be one")
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}") from None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {str(error).splitlines()[0]}") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _digest_of(manifest):
        raise ValueError(f"{MANIFEST} differs from its digest")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')}, this version reads {FORMAT}")
    return manifest


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _read(path: Path, size: int) -> bytes:
    try:
        found = path.stat().st_size
        if found != size:
            raise ValueError(f"{path.name} has {found} bytes instead of {size}")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error

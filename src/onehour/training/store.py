"""A run's checkpoints on disk: each whole under its name or not there, verified before use.

A checkpoint is a folder of files, with manifest.json of their sizes and digests, which has a digest itself. It is
written under another name, brought to disk, and renamed; so what has its name is whole, unless the disk changed it
later. It loses that name before it is deleted. Which is the newest is read from the names, never written down.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onehour.config import Recipe
from onehour.files import remove, sync_folder, write_new

__all__ = ["Store", "Stored", "as_safetensors", "checkpoint_folders", "digest_of_recipe", "read_manifest", "write_file"]

CHECKPOINTS, MANIFEST, FORMAT = "checkpoints", "manifest.json", 1
NAME = re.compile(r"iteration-(\d{9,18})", re.ASCII)
FILE = re.compile(r"\w[\w.-]*", re.ASCII)
LARGEST = 2**20
"""Bytes of a manifest."""
WRITING, DROPPING, REPLACED, DAMAGED = ".writing-", ".dropping-", ".replaced-", ".damaged-"
"""What the names begin with of folders that are no checkpoints: yet; any more; until another one has their name; and
because a run has passed over them, until it has saved their iteration, or a later one, again."""
TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """A checkpoint: after which iteration it was taken, the digest of its run's recipe, whether all its numbers are
    finite, (bytes, SHA-256) by the names of its files, and once they are compared with that, their contents."""

    iteration: int
    recipe: str
    finite: bool
    files: dict[str, tuple[int, str]]
    contents: dict[str, bytes] = field(default_factory=dict)


class Store:
    """The checkpoints of one run.

    Args:
        folder: the run's.
        recipe: its digest; a checkpoint of another recipe does not belong to this run.
        kept: how many verified ones stay when it is thinned.
        needs: files without which a folder is no checkpoint.
        shown: the run's folder in messages, where `folder` is another path to it.
    """

    def __init__(
        self, folder: Path, *, recipe: str, kept: int = 2, needs: Collection[str] = (), shown: Path | None = None
    ) -> None:
        self.folder, self.shown = folder / CHECKPOINTS, (shown or folder) / CHECKPOINTS
        self.recipe, self.kept, self.needs = recipe, kept, frozenset(needs)
        self.problems: list[str] = []
        """What was wrong with newer checkpoints than the one that `newest` gave."""
        self._passed_over: list[Path] = []
        self._known: dict[Any, bool | None] = {}
        """Whether what this process has verified is finite, None if damaged; by its files' sizes and times."""

    def write(self, iteration: int, files: Mapping[str, bytes | Mapping[str, Tensor]]) -> Path:
        """Write a checkpoint, and thin the older ones.

        Raises:
            OSError: if the disk refuses; the next start, or the next write, removes what is left then.
        """
        final = self.folder / f"iteration-{iteration:09d}"
        writing, aside = (self.folder / f"{prefix}{final.name}" for prefix in (WRITING, REPLACED))
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        self.clear_leftovers()
        try:
            writing.mkdir()
            written = {name: write_file(writing / name, content) for name, content in files.items()}
            finite = all(numbers for _, numbers in written.values())
            manifest = {"format": FORMAT, "iteration": iteration, "recipe": self.recipe, "finite": finite}
            manifest["files"] = {name: about for name, (about, _) in written.items()}
            text = json.dumps(manifest | {"sha256": _digest_of(manifest)}, indent=2)
            write_new(writing / MANIFEST, [text.encode()])
            sync_folder(writing)
            with suppress(FileNotFoundError):  # the same iteration again: it was damaged, or it is evaluated now
                final.rename(aside)
            try:
                writing.rename(final)
            except BaseException:
                with suppress(FileNotFoundError):
                    aside.rename(final)
                raise
            sync_folder(self.folder)
        except BaseException:
            self._remove(writing)
            raise
        self._known[_stamp_of(final)] = finite
        self._remove(aside)
        with suppress(OSError):  # what should go stays for the next time; what was written is written
            self.thin()
            for path in self.folder.iterdir():
                match = NAME.fullmatch(path.name.removeprefix(DAMAGED))
                if path.name.startswith(DAMAGED) and match and int(match[1]) <= iteration:
                    self._remove(path)
        return final

    def newest(self) -> Stored | None:
        """The newest checkpoint that verifies; None where there is none at all.

        Raises:
            ValueError: if there are some and none verifies.
        """
        self.problems, self._passed_over = [], []
        try:
            folders = checkpoint_folders(self.folder.parent, self.shown)
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
            self._known[stamp] = stored.finite
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
        """
        try:
            for folder in self._passed_over:
                aside = folder.with_name(f"{DAMAGED}{folder.name}")
                self._remove(aside)
                folder.rename(aside)
            if self._passed_over:
                sync_folder(self.folder)
        except OSError as error:
            raise ValueError(f"{self.shown} cannot be written: {error.strerror}") from error

    def verified(self, folder: Path) -> Stored:
        """A checkpoint, read once, and compared with its manifest as it was read.

        Raises:
            ValueError: saying what is wrong with it.
        """
        stored = read_manifest(folder)
        match = NAME.fullmatch(folder.name)
        if match is None or int(match[1]) != stored.iteration:
            raise ValueError(f"its manifest is that of iteration {stored.iteration}")
        if stored.recipe != self.recipe:
            raise ValueError("it belongs to a run of another recipe")
        if missing := sorted(self.needs - stored.files.keys()):
            raise ValueError(f"its manifest has no {', '.join(missing)}")
        for name, (size, digest) in stored.files.items():
            stored.contents[name] = _read_plain(folder / name, size)
            if hashlib.sha256(stored.contents[name]).hexdigest() != digest:
                raise ValueError(f"{name} differs from its digest")
        return stored

    def thin(self) -> None:
        """Drop what is older than the last `kept` verified ones, but never the last one that is finite."""
        known: dict[Any, bool | None] = {}
        verified, has_finite = 0, False
        for folder in reversed(checkpoint_folders(self.folder.parent)):
            enough = verified >= self.kept
            finite = None if enough and has_finite else self._look(folder, known)
            # One that cannot be read today may be the last finite one: it stays until another is known to be.
            if enough and (has_finite or finite is False):
                dropping = self.folder / f"{DROPPING}{folder.name}"
                with suppress(OSError):
                    folder.rename(dropping)  # first: what is half deleted must not look like a checkpoint
                    self._remove(dropping)
                continue
            verified += finite is not None
            has_finite |= bool(finite)
        self._known = known

    def clear_leftovers(self) -> None:
        """Remove what a killed process was writing or removing; what was about to be replaced gets its name back.

        Only for who holds the run's lock.
        """
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            final = path.with_name(path.name.removeprefix(REPLACED))
            if final != path and not os.path.lexists(final):
                path.rename(final)
            elif path.name.startswith((WRITING, DROPPING, REPLACED)):
                self._remove(path)

    def _look(self, folder: Path, known: dict[Any, bool | None]) -> bool | None:
        """Whether a checkpoint is finite; None where it cannot be trusted. Read again only if its files changed."""
        stamp = _stamp_of(folder)
        if stamp in self._known:
            known[stamp] = self._known[stamp]
        else:
            known[stamp] = None
            with suppress(ValueError):
                known[stamp] = self.verified(folder).finite
        return known[stamp]

    def _remove(self, path: Path) -> None:
        """A folder and all in it, or a link that somebody put in its place; what the disk keeps stays."""
        with suppress(OSError):
            remove(self.folder, path.name)


def checkpoint_folders(folder: Path, shown: Path | None = None) -> list[Path]:
    """The checkpoints in a run's folder by their names, the newest last; `shown` is where they are, in messages.

    Raises:
        ValueError: if a link stands in their place.
    """
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_symlink():
        raise ValueError(
            f"{shown or checkpoints} is a link, and what lies behind it does not belong to the run; remove it, or give"
            " --out on the disk that it leads to"
        )
    if not checkpoints.is_dir():
        return []
    found = [path for path in checkpoints.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def digest_of_recipe(recipe: Recipe) -> str:
    """SHA-256 of a completed recipe: a checkpoint says whose it is."""
    return hashlib.sha256(recipe.to_toml().encode()).hexdigest()


def read_manifest(folder: Path) -> Stored:
    """What a checkpoint's manifest says, if it is sound and names no file elsewhere; nothing else is read.

    Raises:
        ValueError: saying what is wrong with it.
    """
    content = _read_plain(folder / MANIFEST, None)
    try:
        found = json.loads(content)
        said = found.pop("sha256", None) if isinstance(found, dict) else None
        sound = said is not None and said == _digest_of(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {str(error).splitlines()[0]}") from error
    if not sound:
        raise ValueError(f"{MANIFEST} differs from its digest")
    if found.get("format") != FORMAT:
        raise ValueError(f"its format is {found.get('format')!r:.40}, this version reads {FORMAT}")
    kinds = {"iteration": int, "recipe": str, "finite": bool, "files": dict}
    if any(type(found.get(key)) is not kind for key, kind in kinds.items()):
        raise ValueError(f"{MANIFEST} was not written by onehour")
    files = {}
    for name, about in found["files"].items():
        if not FILE.fullmatch(name):
            raise ValueError(f"its manifest names a file outside it, {name!r:.40}")
        size, digest = (about.get("bytes"), about.get("sha256")) if isinstance(about, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise ValueError(f"{MANIFEST} was not written by onehour")
        files[name] = size, digest
    return Stored(found["iteration"], found["recipe"], found["finite"], files)


def write_file(path: Path, content: bytes | Mapping[str, Tensor]) -> tuple[dict[str, Any], bool]:
    """Write a new file of bytes, or of tensors in safetensors' format, on disk when this returns.

    Args:
        content: tensors in CPU memory, by name.

    Returns:
        {"bytes": its size, "sha256": its digest}, and whether all its numbers are finite.

    Raises:
        OSError: if the disk refuses, or the file is there already.
        ValueError: for a type that the format does not have.
    """
    digest, size = hashlib.sha256(), 0

    def parts() -> Iterator[bytes | memoryview]:
        nonlocal size
        for part in [content] if isinstance(content, bytes) else as_safetensors(content):
            digest.update(part)
            size += len(part)
            yield part

    write_new(path, parts())
    finite = isinstance(content, bytes) or all(_is_finite(tensor) for tensor in content.values())
    return {"bytes": size, "sha256": digest.hexdigest()}, finite


def as_safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A file of tensors in CPU memory, in safetensors' format, part by part.

    A header's length (8 bytes, little-endian), a JSON header of types, shapes and offsets, then the tensors: wide types
    first, as the format wants them aligned to their own size.

    Raises:
        ValueError: for a type that the format does not have.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, offset = {}, 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in TYPES:
            raise ValueError(f"{name} is {tensor.dtype}, which safetensors files here do not hold; use float32")
        span = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield tensors[name].reshape(-1).view(torch.uint8).numpy().data


def _is_finite(tensor: Tensor) -> bool:
    """Smallest and largest take one pass and no memory; a NaN is both."""
    return not tensor.numel() or all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor))


def _read_plain(path: Path, size: int | None) -> bytes:
    """All of a plain file; of the size that it must have, None for a manifest.

    Raises:
        ValueError: if it is not there, is none, is of another size, or cannot be read.
    """
    try:
        # Neither through a link to another's file, nor waiting for a pipe that nobody writes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path.name} is not a plain file")
            if size is None and status.st_size > LARGEST:
                raise ValueError(f"{path.name} is too large to be one")
            if size is not None and status.st_size != size:
                raise ValueError(f"{path.name} has {status.st_size} bytes instead of {size}")
            return file.readall()
    except MemoryError:
        raise ValueError(f"{path.name} does not fit into memory") from None
    except OSError as error:
        if size is None and isinstance(error, FileNotFoundError):
            raise ValueError(f"it has no {path.name}") from None
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error


def _stamp_of(folder: Path) -> Any:
    """What differs when somebody has changed a file since: names, sizes and times."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    except OSError:
        return folder.name
    return tuple(sorted((name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found))


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

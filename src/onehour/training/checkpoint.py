"""A run's checkpoints: each whole under its name or not there, verified before use, and written behind the run's back.

A checkpoint is a folder of files, with manifest.json of their sizes and digests, which has a digest itself. It is
written under another name, brought to disk, and renamed; so what has its name is whole, unless the disk changed it
later. It loses that name before it is deleted. Which is the newest is read from the names, never written down. No
pickle and no generator states: everything random is keyed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from onehour.config import Recipe
from onehour.dist.group import Group
from onehour.files import make_folder, remove, sync_folder, write_new
from onehour.lock import FolderLostError
from onehour.messages import shown
from onehour.sidefile import COUNT, FLAG, NUMBER, TEXT, Kind, is_list, is_object, object_of
from onehour.training.state import Network, as_safetensors

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
FILES = ("model.safetensors", "optimizer.safetensors", "progress.json")
NAME = re.compile(r"iteration-(\d{9,18})", re.ASCII)
WRITING, DROPPING, REPLACED, DAMAGED = ".writing-", ".dropping-", ".replaced-", ".damaged-"
"""What the names begin with of folders that are no checkpoints: yet; any more; until another one has their name; and
because a run has passed over them, until it has saved their iteration, or a later one, again."""
LARGEST = 2**20
"""Bytes of a manifest."""
KINDS: dict[str, Kind] = {
    "format": ("1, which this version reads", lambda value: value == 1),
    "iteration": COUNT,
    "recipe": TEXT,
    "finite": FLAG,
    "files": (f"bytes and sha256 of {', '.join(FILES)}", is_object(is_object(names=("bytes", "sha256")), FILES)),
    "sha256": TEXT,
}
"""Of a manifest."""


PROGRESS: dict[str, Kind] = {
    "position": COUNT,
    "totals": (
        "two numbers or more",
        lambda value: is_list(lambda number: isinstance(number, float))(value) and len(value) > 1,
    ),
    "build": ("texts by name", is_object(lambda value: isinstance(value, str) and value.isprintable())),
    "evaluated": FLAG,
    "skipped": COUNT,
    "rate": NUMBER,
}
"""Of progress.json, beside the iteration; the last three may be missing."""


class Stored(NamedTuple):
    """A checkpoint that verifies: after which iteration it was taken, whether all its numbers are finite, and what its
    files hold, in the order of `FILES`."""

    iteration: int
    finite: bool
    contents: list[bytes]


class Store:
    """The checkpoints of one run.

    Args:
        recipe: its digest; a checkpoint of another recipe does not belong to this run.
        shown: the run's folder in messages, where `folder` is another path to it.
    """

    kept = 2
    """How many verified ones stay when it is thinned."""

    def __init__(self, folder: Path, *, recipe: str, shown: Path | None = None) -> None:
        self.folder, self.shown, self.recipe = folder / CHECKPOINTS, (shown or folder) / CHECKPOINTS, recipe
        self._written: dict[Path, tuple[Any, bool]] = {}
        """What this process has written: its files' sizes and times then, and whether it is finite."""

    def write(self, iteration: int, contents: Sequence[bytes | Mapping[str, Tensor]]) -> Path:
        """Write a checkpoint, and thin the older ones.

        Args:
            contents: in the order of `FILES`; tensors in CPU memory, by name.

        Raises:
            OSError: if the disk refuses; what is left then is removed by the next start, or the next write.
        """
        final = self.folder / f"iteration-{iteration:09d}"
        writing = self.folder / f"{WRITING}{final.name}"
        make_folder(self.folder)
        self.clear_leftovers()
        try:
            writing.mkdir()
            files, finite = dict[str, dict[str, Any]](), True
            for name, content in zip(FILES, contents, strict=True):
                parts = [content] if isinstance(content, bytes) else list(as_safetensors(content))
                write_new(writing / name, parts)
                files[name] = {"bytes": sum(map(len, parts)), "sha256": _sha256(*parts)}
                finite &= isinstance(content, bytes) or all(map(_is_finite, content.values()))
            manifest = {"format": 1, "iteration": iteration, "recipe": self.recipe, "finite": finite, "files": files}
            text = json.dumps(manifest | {"sha256": _digest_of(manifest)}, indent=2)
            write_new(writing / MANIFEST, [text.encode()])
            sync_folder(writing)
            with suppress(FileNotFoundError):  # the same iteration again: it was damaged, or it is evaluated now
                final.rename(self.folder / f"{REPLACED}{final.name}")
            writing.rename(final)
            sync_folder(self.folder)
        finally:
            with suppress(OSError):
                self.clear_leftovers()
        self._written[final] = _stamp_of(final), finite
        with suppress(OSError):  # what should go stays for the next time; what was written is written
            self.thin()
            for path in self.folder.glob(f"{DAMAGED}*"):
                if 0 <= _iteration_of(path.name.removeprefix(DAMAGED)) <= iteration:
                    self._remove(path)
        return final

    def newest(self, warn: Callable[[str], None], *, resumes: bool = False) -> Stored | None:
        """The newest checkpoint that verifies; None where there is none at all.

        Args:
            resumes: for who holds the run's lock, and trains: what is newer loses its name. The record is cut to the
                checkpoint that is used, behind which one that could not be read for a moment must not be found again.
        """
        if resumes:
            with suppress(OSError):  # what can be read is enough; the next write says what is wrong with the disk
                self.clear_leftovers()
        left_out: list[tuple[Path, ValueError]] = []
        for folder in reversed(checkpoint_folders(self.folder.parent, self.shown)):
            try:
                stored = self.verified(folder)
            except ValueError as error:
                left_out.append((folder, error))
                continue
            for newer, error in left_out:
                warn(f"a damaged checkpoint was left out: {newer.name}: {error}; {folder.name} is used in its place")
                if resumes:
                    aside = newer.with_name(f"{DAMAGED}{newer.name}")
                    self._remove(aside)
                    newer.rename(aside)
                    sync_folder(self.folder)
            return stored
        if left_out:
            problems = "; ".join(f"{folder.name}: {error}" for folder, error in left_out)
            raise ValueError(f"no checkpoint in {self.shown} can be trusted ({problems}); start over with --fresh")
        return None

    def verified(self, folder: Path) -> Stored:
        """A checkpoint, read once, and compared with its manifest; else a ValueError says what is wrong with it."""
        manifest = read_manifest(folder)
        iteration = manifest["iteration"]
        if _iteration_of(folder.name) != iteration:
            raise ValueError(f"its manifest is that of iteration {iteration}")
        if manifest["recipe"] != self.recipe:
            raise ValueError("it belongs to a run of another recipe")
        contents: list[bytes] = []
        for name in FILES:
            about = manifest["files"][name]
            contents.append(_read_plain(folder / name, about["bytes"]))
            if _sha256(contents[-1]) != about["sha256"]:
                raise ValueError(f"{name} differs from its digest")
        same: Kind = (f"{iteration}", lambda value: value == iteration)
        object_of(contents[-1], PROGRESS | {"iteration": same}, ("iteration", "position", "totals", "build"))
        return Stored(iteration, manifest["finite"], contents)

    def thin(self) -> None:
        """Drop what is older than the last `kept` verified ones, but never the last one that is finite."""
        verified, has_finite = 0, False
        for folder in reversed(checkpoint_folders(self.folder.parent)):
            enough = verified >= self.kept
            finite = None if enough and has_finite else self._is_finite(folder)
            # One that cannot be read today may be the last finite one: it stays until another is known to be.
            if enough and (has_finite or finite is False):
                self._written.pop(folder, None)
                dropping = self.folder / f"{DROPPING}{folder.name}"
                with suppress(OSError):
                    folder.rename(dropping)  # first: what is half deleted must not look like a checkpoint
                    self._remove(dropping)
                continue
            verified += finite is not None
            has_finite |= bool(finite)

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

    def _is_finite(self, folder: Path) -> bool | None:
        """None where it cannot be trusted. What this process has written is read again only if somebody changed it."""
        stamp, finite = self._written.get(folder, (None, None))
        if stamp == _stamp_of(folder):
            return finite
        with suppress(ValueError):
            return self.verified(folder).finite
        return None

    def _remove(self, path: Path) -> None:
        """A folder and all in it, or a link that somebody put in its place; what the disk keeps stays."""
        with suppress(OSError):
            remove(self.folder, path.name)


def checkpoint_folders(folder: Path, shown: Path | None = None) -> list[Path]:
    """The checkpoints in a run's folder by their names, the newest last; `shown` is where they are, in messages."""
    checkpoints = folder / CHECKPOINTS
    if checkpoints.is_symlink():
        raise ValueError(
            f"{shown or checkpoints} is a link, and what lies behind it does not belong to the run; remove it, or give"
            " --out on the disk that it leads to"
        )
    found = [path for path in checkpoints.iterdir() if NAME.fullmatch(path.name)] if checkpoints.is_dir() else []
    return sorted(found, key=lambda path: _iteration_of(path.name))


def digest_of_recipe(recipe: Recipe) -> str:
    """SHA-256 of a completed recipe: a checkpoint says whose it is."""
    return _sha256(recipe.to_toml().encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint's manifest says, if it is sound; nothing else is read."""
    content = _read_plain(folder / MANIFEST)
    try:
        found = object_of(content, KINDS, KINDS)
        if found.pop("sha256") != _digest_of(found):
            raise ValueError("it differs from its digest")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {error}") from error
    return found


@dataclass(frozen=True)
class Progress:
    """Where a run stands at a checkpoint: progress.json."""

    iteration: int
    position: int
    totals: list[float]
    """Σ of the iterations' mean losses and of the task's other rows since the last evaluation."""
    build: dict[str, str]
    evaluated: bool = True
    """Whether the record has this iteration's evaluation, if there is one."""
    skipped: int | None = None
    rate: float | None = None
    """Of the last iteration; None where it is the schedule's, as it is unless the run went on from another one."""
    noise: list[list[float]] | None = None
    """Points of the gradient noise since the last evaluation, where some were measured."""

    gains: list[float] | None = None
    """Where AdaScale stands."""

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class SaveInterval:
    """When to save: at evaluations, and between them every so many iterations, or minutes; None for never.

    Args:
        between: else at the last evaluation, and at others once the minutes are over.
    """

    def __init__(self, iterations: int | None, minutes: float | None, *, between: bool = True) -> None:
        self.iterations, self.minutes, self.between = iterations, minutes, between
        self._since = time.monotonic()

    def is_over(self, done: int, *, ends_epoch: bool, last: bool) -> bool:
        """Whether it is time to save after iteration `done`, which an evaluation may follow, even the last."""
        if self.between:
            return ends_epoch or self._is_over(done)
        return ends_epoch and (last or self._is_over(done))

    def _is_over(self, done: int) -> bool:
        if self.iterations and done % self.iterations == 0:
            return True
        if self.minutes is None or time.monotonic() - self._since < 60 * self.minutes:
            return False
        self._since = time.monotonic()
        return True


class Checkpoints:
    """Saves and loads a run's checkpoints: process 0 alone touches the disk, and the others get its bytes."""

    def __init__(
        self, folder: Path, recipe: Recipe, group: Group, *, warn: Callable[[str], None], inside: Path | None = None
    ) -> None:
        self.store = Store(inside or folder, recipe=digest_of_recipe(recipe), shown=folder)
        self.group, self.warn = group, warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._failed = False
        self._bytes = 0

    def load(self, network: Network) -> dict[str, Any] | None:
        """Load the newest checkpoint that verifies, on every process; its progress, None where there is none."""
        found: list[bytes | None] = [None] * (1 + len(FILES))
        if self.group.rank == 0:
            try:
                stored = self.store.newest(self.warn, resumes=True)
                found[1:] = stored.contents if stored else found[1:]
            except OSError as error:
                found[0] = f"{self.store.shown} cannot be read or written: {error.strerror}".encode()
            except ValueError as error:
                found[0] = str(error).encode()
        refused, *files = [self.group.broadcast(part) for part in found]
        if refused is not None:
            raise ValueError(refused.decode())
        contents = [file for file in files if file is not None]
        if not contents:
            return None
        try:
            network.load(load(contents[0]), load(contents[1]))
        except (SafetensorError, KeyError, RuntimeError) as error:
            said = shown(str(error).splitlines()[-1].strip())
            raise ValueError(f"{self.store.shown} is of another model: {said}") from error
        return json.loads(contents[2])

    def save(self, network: Network, progress: dict[str, Any], *, first: Callable[[], None] | None = None) -> None:
        """Write a checkpoint of iteration progress["iteration"], in the background.

        Until `network.finish_copy`, weights and velocity are copied from where they lie. A disk that refuses is a
        warning: training goes on.

        Args:
            first: writes what the checkpoint counts on; if the disk refuses that, there will be no checkpoint either.
        """
        if self.group.rank != 0:
            return
        self.wait()
        self._bytes, copies = network.begin_copy(self._thread)

        def write() -> None:
            if first is not None:
                first()
            network.finish_copy()  # raises what the copying has
            self.store.write(progress["iteration"], [*copies, json.dumps(progress, indent=2).encode()])

        self._writing = self._thread.submit(write)

    def wait(self) -> bool:
        """Wait until the last `save` is on disk; whether it is."""
        if self._writing is not None:
            error = self._writing.exception()
            self._writing = None
            if isinstance(error, OSError) and not self._failed:
                self.warn(
                    f"no checkpoint could be written to {self.store.shown}: {error.strerror or error} ({self._bytes:,}"
                    " bytes are needed); training goes on, and earlier checkpoints stay"
                )
            elif not isinstance(error, OSError | FolderLostError | None):  # whoever looks at a lost folder says so
                raise error
            self._failed = error is not None
        return not self._failed

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()


def _is_finite(tensor: Tensor) -> bool:
    """Smallest and largest take one pass and no memory; a NaN is both."""
    return not tensor.numel() or all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor))


def _read_plain(path: Path, size: int | None = None) -> bytes:
    """All of a regular file; without a size that it must have, at most as much as a manifest has."""
    try:
        # Neither through a link to another's file, nor waiting for a pipe that nobody writes.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path.name} is not a regular file")
            if size not in (None, status.st_size):
                raise ValueError(f"{path.name} has {status.st_size} bytes instead of {size!r}")
            return file.read(LARGEST if size is None else -1)
    except MemoryError:
        raise ValueError(f"{path.name} does not fit into memory") from None
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error


def _iteration_of(name: str) -> int:
    """Of a checkpoint, by its folder's name; -1 for another name."""
    match = NAME.fullmatch(name)
    return int(match[1]) if match else -1


def _stamp_of(folder: Path) -> Any:
    """What differs when somebody has changed a file since: names, sizes and times; None where that cannot be told."""
    with suppress(OSError):
        files = [(path.name, path.lstat()) for path in folder.iterdir()]
        return sorted((name, about.st_ino, about.st_size, about.st_mtime_ns) for name, about in files)
    return None


def _digest_of(manifest: dict[str, Any]) -> str:
    return _sha256(json.dumps(manifest, sort_keys=True).encode())


def _sha256(*parts: bytes | memoryview) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()

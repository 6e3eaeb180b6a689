"""What a checkpoint's folder says of itself: a manifest of its files' sizes and digests, which has a digest itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.training.tensorfile import write_bytes

__all__ = ["MANIFEST", "Manifest", "digest_of_recipe", "read_manifest", "read_plain", "write_manifest"]

MANIFEST = "manifest.json"
FORMAT = 1
FILE = re.compile(r"\w[\w.-]*", re.ASCII)
LARGEST = 2**20
"""Bytes of a manifest."""


@dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint.

    Args:
        iteration: after which it was taken.
        recipe: digest of its run's.
        finite: whether all its numbers are.
        files: (bytes, SHA-256) by the names of its files.

    >>> Manifest(7, "", True, {"a": (3, "…")}).iteration
    7
    """

    iteration: int
    recipe: str
    finite: bool
    files: dict[str, tuple[int, str]]


def digest_of_recipe(recipe: Recipe) -> str:
    """SHA-256 of a completed recipe: a checkpoint says whose it is.

    >>> digest_of_recipe(Recipe()) == digest_of_recipe(Recipe(seed=1))
    False
    """
    return hashlib.sha256(recipe.to_toml().encode()).hexdigest()


def write_manifest(folder: Path, *, iteration: int, recipe: str, finite: bool, files: dict[str, Any]) -> None:
    """Write a manifest, on disk when this returns; arguments as of `Manifest`.

    Args:
        files: {"bytes": …, "sha256": …} by name.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_manifest(Path(folder), iteration=7, recipe="", finite=True, files={})
    ...     read_manifest(Path(folder))
    Manifest(iteration=7, recipe='', finite=True, files={})
    """
    content = {"format": FORMAT, "iteration": iteration, "recipe": recipe, "finite": finite, "files": files}
    text = json.dumps(content | {"sha256": _digest_of(content)}, indent=2)
    write_bytes(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest, if it is sound and names no file elsewhere.

    Raises:
        ValueError: saying what is wrong with it.

    >>> read_manifest(Path("nowhere"))
    Traceback (most recent call last):
    ValueError: it has no manifest.json
    """
    content = read_plain(folder / MANIFEST, None)
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
    iteration, recipe, finite, files = (found.get(key) for key in ("iteration", "recipe", "finite", "files"))
    if not (
        type(iteration) is int and isinstance(recipe, str) and isinstance(finite, bool) and isinstance(files, dict)
    ):
        raise ValueError(f"{MANIFEST} is none of ours")
    return Manifest(iteration, recipe, finite, {name: _known(name, about) for name, about in files.items()})


def read_plain(path: Path, size: int | None) -> bytes:
    """All of a plain file.

    Args:
        size: what it must have; None for a manifest.

    Raises:
        ValueError: if it is not there, is none, is of another size, or cannot be read.

    >>> read_plain(Path("nowhere"), 3)
    Traceback (most recent call last):
    ValueError: nowhere cannot be read: No such file or directory
    """
    try:
        # Neither through a link to another's file, nor waiting for a pipe that nobody writes.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path.name} is no plain file")
            if size is None and status.st_size > LARGEST:
                raise ValueError(f"{path.name} is too large to be one")
            if size is not None and status.st_size != size:
                raise ValueError(f"{path.name} has {status.st_size} bytes instead of {size}")
            return file.readall()
    except MemoryError:
        raise ValueError(f"{path.name} does not fit into memory") from None
    except FileNotFoundError as error:
        if size is None:
            raise ValueError(f"it has no {path.name}") from None
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error


def _known(name: str, about: Any) -> tuple[int, str]:
    if not FILE.fullmatch(name):
        raise ValueError(f"its manifest names a file outside it, {name!r:.40}")
    size, digest = (about.get("bytes"), about.get("sha256")) if isinstance(about, dict) else (None, None)
    if type(size) is not int or not isinstance(digest, str):
        raise ValueError(f"{MANIFEST} is none of ours")
    return size, digest


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()

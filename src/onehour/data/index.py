"""A folder's listing, saved: a start need not list a million files, and every process has the same arrays.

The file is safetensors, so that anyone can read it. Its metadata has one entry, "onehour": JSON with what the arrays
are about and a SHA-256 of everything, so that a damaged file is never half believed. It is read into memory once, which
processes that are forked afterwards have in common. It is not mapped: a file that is cut short in its place would end
every process that looks at it, without a word.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from onehour.data.dataset import FaultError
from onehour.data.listing import SIDES, Files, Names, Table, expected, list_class, list_classes, list_sides, refuse
from onehour.data.processes import Done, ignore, spans, spread
from onehour.files import replace_whole

KEY = "onehour"
AGAIN = "make it again"
LONGEST = 2**28
"""Bytes of a header at most: it names every class."""
TYPES = {"U8": np.uint8, "I32": np.int32, "U32": np.uint32, "I64": np.int64}


def write_arrays(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    """Write a file of arrays of uint8, int32, uint32 or int64, whole or not at all."""
    arrays = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    metadata = {KEY: json.dumps({"about": about, "sha256": _digest(arrays, about)})}
    replace_whole(path.parent, path.name, save(arrays, metadata=metadata))


def open_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file, read-only views of its bytes, and what they are about."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = dict(json.loads(file.read(length if length <= LONGEST else 0)))
            own = json.loads(header.pop("__metadata__")[KEY])
            about, digest = own["about"], own["sha256"]
            content = file.read()
        arrays = {name: _array(content, entry) for name, entry in header.items()}
    except OSError as error:
        raise FaultError(str(path), f"cannot be read: {error.strerror or error}", AGAIN) from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FaultError(str(path), "is not an index of onehour, or is damaged", AGAIN) from error
    if _digest(arrays, about) != digest:
        raise FaultError(str(path), "is damaged: its SHA-256 is not the one that it was written with", AGAIN)
    return arrays, about


def _digest(arrays: dict[str, np.ndarray], about: Any) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"\n{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _array(content: bytes, entry: dict[str, Any]) -> np.ndarray:
    first, last = entry["data_offsets"]
    kind = np.dtype(TYPES[entry["dtype"]]).newbyteorder("<")
    return np.frombuffer(content, kind, (last - first) // kind.itemsize, first).reshape(entry["shape"])


INDEX = "onehour.index"
"""What an index is called beside the folders train and val, and in a pack."""
FORMAT = 1
TICK = 20_000_000
"""Nanoseconds for which a file system's clock may stand still."""


@dataclass(frozen=True)
class Index:
    """An index that was read."""

    path: Path
    arrays: dict[str, np.ndarray]  # of both sides, by the names of `columns`
    about: dict[str, Any]  # kind, classes, and what else such an index says

    @property
    def root(self) -> Path:
        """The folder that it lists, or that holds its shards."""
        return self.path.parent / str(self.about.get("root", "."))

    def table(self, side: str) -> Table:
        """One side's images; a FaultError if a wrong or a malicious index has no table that a listing would have."""
        classes = self.about.get("folders", {}).get(side, self.about["classes"])
        found = [self.arrays.get(f"{side}.{name}") for name in ("labels", "names", "ends", "sizes", "checks")]
        labels, buffer, ends, sizes, checks = found
        if labels is None or buffer is None or ends is None or sizes is None or len(ends) != len(labels) + 1:
            raise FaultError(str(self.path), "is not a complete index", AGAIN)
        table = Table(classes, labels, Names(buffer, ends), sizes, checks)
        steps = np.diff(labels)
        ordered = len(labels) > 0 and labels[0] == 0 and labels[-1] == len(classes) - 1
        named = Names.of(classes).safe() and table.names.safe()
        whole = len(sizes) == len(labels) and (sizes >= 0).all() and (checks is None or len(checks) == len(labels))
        if not (ordered and ((steps == 0) | (steps == 1)).all() and named and whole):
            raise FaultError(str(self.path), "names files or classes that no listing would have", AGAIN)
        return table

    def files(self, side: str) -> Files:
        """One side of the folder that it lists; the folder itself is not looked at."""
        return Files(self.root / side, self.table(side))

    def changes(self) -> list[FaultError]:
        """Every file of the folder that came or went since.

        A class whose folder has the time and size that it had is not listed. A file that was overwritten in its place
        is noticed when it is read.
        """
        found: list[FaultError] = []
        for side in SIDES:
            _add_changes(found, self.root / side, self.table(side), self.about["stamps"][side])
        return found


def index_of(path: Path) -> Path | None:
    """The index that a path means: itself, or the one inside; None if there is none."""
    if path.suffix == Path(INDEX).suffix and path.is_file():
        return path
    return path / INDEX if (path / INDEX).is_file() else None


def write_index(
    root: Path, path: Path | None = None, *, digests: bool = False, jobs: int = 1, done: Done = ignore
) -> Path:
    """List ROOT/train/CLASS/* and ROOT/val/CLASS/*, and save the list.

    Args:
        path: the file to write; None is ROOT/onehour.index.
        digests: read every file and keep its CRC-32, which is then compared at every read.
        done: is told of every class that is listed, and with digests of every file that is read.
    """
    path = path or root / INDEX
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}; {expected(root)}")
    stamps = {side: _stamps(root / side) for side in SIDES}
    newest = max((stamp[0] for side in stamps.values() for stamp in side.values()), default=0)
    if 0 <= time.time_ns() - newest < TICK:
        time.sleep(TICK / 1e9)  # a change from now on then gives its folder another time
    faults: list[FaultError] = []
    tables = list_sides(root, faults, sizes=True, done=done)
    refuse(faults, root)
    arrays: dict[str, np.ndarray] = {}
    for side, table in tables.items():
        checks = None
        if digests:
            work = partial(_check_span, Files(root / side, table))
            parts = spread(work, spans(len(table), 256), jobs=jobs, done=done)
            refuse([fault for _, faults in parts for fault in faults], root)
            checks = np.concatenate([found for found, _ in parts])
        arrays |= columns(side, table, checks)
    classes, folders = tables["train"].classes, {side: table.classes for side, table in tables.items()}
    about = {
        "format": FORMAT,
        "kind": "folder",
        "root": "." if path.parent.resolve() == root.resolve() else str(root.resolve()),
        "classes": classes,
        "stamps": {side: [stamps[side].get(name) for name in folders[side]] for side in SIDES},
    }
    if folders["val"] != classes:  # in the form that Unicode has in common they are the same
        about["folders"] = folders
    try:
        write_arrays(path, arrays, about)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; name another place with --out") from error
    return path


def read_index(path: Path) -> Index:
    """An index of this version."""
    arrays, about = open_arrays(path)
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise FaultError(str(path), "is an index of another version of onehour", AGAIN)
    classes, by_side = about.get("classes"), about.get("stamps" if about.get("kind") == "folder" else "shards")
    folders = about.get("folders", dict.fromkeys(SIDES, classes))
    sound = isinstance(folders, dict) and all(_are_names(names, classes) for names in (classes, *folders.values()))
    if not sound or not isinstance(by_side, dict) or not all(isinstance(by_side.get(side), list) for side in SIDES):
        raise FaultError(str(path), "is not a complete index", AGAIN)
    return Index(path, arrays, about)


def columns(side: str, table: Table, checks: np.ndarray | None) -> dict[str, np.ndarray]:
    """A table's arrays by the names that they have in an index's file."""
    assert table.sizes is not None
    named = {"labels": table.labels, "names": table.names.buffer, "ends": table.names.ends, "sizes": table.sizes}
    if checks is not None:
        named["checks"] = checks
    return {f"{side}.{name}": array for name, array in named.items()}


def _are_names(names: Any, classes: Any) -> bool:
    return isinstance(names, list) and len(names) == len(classes) and all(isinstance(name, str) for name in names)


def _stamps(root: Path) -> dict[str, list[int]]:
    """Time and size of each class's folder: adding, removing or renaming a file changes its time."""
    stamps = {}
    for name in list_classes(root, []) if root.is_dir() else []:
        try:
            status = (root / name).stat()
        except OSError:
            continue
        stamps[name] = [status.st_mtime_ns, status.st_size]
    return stamps


def _check_span(source: Files, span: range, done: Done) -> tuple[np.ndarray, list[FaultError]]:
    checks, faults = np.zeros(len(span), np.uint32), []
    for row, index in enumerate(span):
        try:
            checks[row] = zlib.crc32(source.read(index))
        except FaultError as fault:
            faults.append(fault)
        done(1)
    return checks, faults


def _add_changes(found: list[FaultError], root: Path, table: Table, stamps: list[Any]) -> None:
    """Changes alone: what is wrong besides is for the doctor to say."""

    def add(inside: str, problem: str, remedy: str) -> None:
        found.append(FaultError(str(root / inside), problem, remedy))

    now = _stamps(root)
    for name in sorted(set(now) - set(table.classes)):
        add(name, "is a class that the index does not have", "index the data again")
    for label, name in enumerate(table.classes):
        if name not in now:
            add(name, "is in the index but missing", "restore it, or index the data again")
        elif stamps[label : label + 1] != [now[name]]:
            known, files = set(table.by_name(label)), {file for file, _ in list_class(root / name, [])}
            for file in sorted(known - files):
                add(f"{name}/{file}", "is in the index but missing", "restore it, or index the data again")
            for file in sorted(files - known):
                add(f"{name}/{file}", "came after the data was indexed", "index the data again, or remove it")

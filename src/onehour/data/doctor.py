"""Everything that is wrong with a folder of images, its index, or a pack, found in one pass."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onehour.data.decode import PIXELS
from onehour.data.faults import FaultError
from onehour.data.index import changes, folder_side, index_of, read_index
from onehour.data.inspect import inspect_image
from onehour.data.listing import SIDES, Report, list_sides
from onehour.data.pack import PARTS
from onehour.data.shards import Shards, key_of, label_member, pack_side
from onehour.data.source import Folder, read_file
from onehour.data.table import Table
from onehour.data.work import Done, spans, spread

__all__ = ["examine"]

DIGEST = 16
Found = tuple[list[FaultError], bytes]
"""The faults of a span of images, and the digest of each."""


def examine(path: Path, *, pixels: int = PIXELS, jobs: int = 1, done: Done = lambda items: None) -> list[FaultError]:
    """Look at every file of a folder of images or of a pack.

    Args:
        path: a folder, its index, or a pack.
        pixels: the cap that images are read with.
        jobs: processes to read with.
        done: is told of every image.

    Returns:
        What is wrong, each with its path and a remedy, in the order of paths; those with `note` cost nothing.

    >>> [fault.problem for fault in examine(Path("nowhere"))]
    ['is no folder, index or pack']
    """
    faults: list[FaultError] = []
    index = index_of(path)
    if index is None and not path.is_dir():
        expected = f"expected {path}/train/CLASS/* and {path}/val/CLASS/*, or a pack"
        return [FaultError(str(path), "is no folder, index or pack", expected)]
    if index is None and ((path / PARTS).is_dir() or list(path.glob("*.tar"))):
        return [FaultError(str(path), "holds shards and no index: it was never finished", "pack the data again")]
    root, kind = path if path.is_dir() else path.parent, "folder"
    looks: list[_FolderLook] | list[_PackLook] = []
    try:
        if index is not None:
            _, about = read_index(index)
            root, kind = index.parent / str(about.get("root", ".")), about["kind"]
    except FaultError as fault:
        faults.append(fault)
        index = None
    try:
        if kind == "pack" and index is not None:
            looks = _look_at_pack(index, pixels, faults.append)
        elif not list(root.glob("*.tar")):
            looks = _look_at_folder(root, index, pixels, faults.append)
    except FaultError as fault:
        faults.append(fault)
    digests = []
    for look in looks:
        found = spread(look, spans(len(look.rows), 64), jobs=jobs, done=done)
        faults += [fault for part, _ in found for fault in part]
        digests.append(b"".join(digest for _, digest in found))
    faults += _twins(looks, digests)
    return sorted(faults, key=lambda fault: fault.path)


@dataclass(frozen=True)
class _FolderLook:
    """Reads the files of a side; sent to the processes that do it."""

    source: Folder
    rows: np.ndarray
    """Of each file its row in the index, or -1."""
    indexed: Table | None
    pixels: int

    def __call__(self, span: range, done: Done) -> Found:
        return _found(span, self._faults, done)

    def place(self, number: int) -> tuple[str, str]:
        """The file's path and class."""
        return self.source.name(number), self.source.classes[self.source.labels[number]]

    def _faults(self, index: int) -> tuple[list[FaultError], bytes]:
        name, row = self.source.name(index), int(self.rows[index])
        data = read_file(name)
        if row >= 0 and self.indexed is not None:
            self.indexed.verify(row, data, lambda _: name)
        return list(inspect_image(data, name, pixels=self.pixels)), data


@dataclass(frozen=True)
class _PackLook:
    """Reads the samples of a side whose shards are whole."""

    source: Shards
    rows: np.ndarray
    """The samples' indices."""
    pixels: int

    def __call__(self, span: range, done: Done) -> Found:
        return _found(span, self._faults, done)

    def place(self, number: int) -> tuple[str, str]:
        """The shard with the file that it was, and its class."""
        index = int(self.rows[number])
        return self.source.name(index), self.source.classes[self.source.labels[index]]

    def _faults(self, number: int) -> tuple[list[FaultError], bytes]:
        index = int(self.rows[number])
        name, label = self.source.name(index), int(self.source.labels[index])
        head, behind = self.source.members(index)
        remedy = "restore the shard, or pack the data again; never extract it"
        try:
            member = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            return [FaultError(name, f"has a damaged header in its shard ({error})", remedy)], b""
        if not (member.isreg() and member.name.encode("utf-8", "surrogateescape").startswith(key_of(index))):
            kind = "a link" if member.issym() or member.islnk() else "a member"
            return [FaultError(name, f"is {kind} called {member.name!r} in its shard", remedy)], b""
        faults = []
        if behind != label_member(index, label):
            faults.append(FaultError(name, f"has not its label, {label}, behind it in the shard", remedy))
        data = self.source.read(index)
        return faults + list(inspect_image(data, name, pixels=self.pixels)), data


def _found(span: range, look: Callable[[int], tuple[list[FaultError], bytes]], done: Done) -> Found:
    faults, digests = [], bytearray()
    for index in span:
        data = b""
        try:
            found, data = look(index)
            faults += found
        except FaultError as fault:
            faults.append(fault)
        digests += hashlib.blake2b(data, digest_size=DIGEST).digest() if data else bytes(DIGEST)
        done(1)
    return faults, bytes(digests)


def _look_at_folder(root: Path, index: Path | None, pixels: int, report: Report) -> list[_FolderLook]:
    tables = list_sides(root, report)
    looks = []
    arrays, about = read_index(index, verify=False) if index is not None else ({}, {})
    if index is not None:
        changes(index, report)
    for side, table in tables.items():
        known = folder_side(index, side, arrays, about, check=True).table if index is not None else None
        looks.append(_FolderLook(Folder(root / side, table), _rows(table, known), known, pixels))
    return looks


def _rows(table: Table, known: Table | None) -> np.ndarray:
    """Of each image, its row in another table of the same files, or -1."""
    rows = np.full(len(table), -1)
    if known is None:
        return rows
    mine, its = (np.searchsorted(t.labels, np.arange(len(t.classes) + 1)) for t in (table, known))
    labels = {name: label for label, name in enumerate(known.classes)}
    for label, name in enumerate(table.classes):
        other = labels.get(name)
        if other is not None:
            found = {known.names[row]: row for row in range(its[other], its[other + 1])}
            for place in range(mine[label], mine[label + 1]):
                rows[place] = found.get(table.names[place], -1)
    return rows


def _look_at_pack(index: Path, pixels: int, report: Report) -> list[_PackLook]:
    arrays, about = read_index(index, verify=False)
    looks, names = [], set()
    for side in SIDES:
        source = pack_side(index, side, arrays, about, check=True)
        whole = np.ones(len(source.labels), bool)
        ends = [*(shard.first for shard in source.shards[1:]), len(whole)]
        for number, (shard, end) in enumerate(zip(source.shards, ends, strict=True)):
            names.add(shard.name)
            fault = source.shard_fault(number, shard)
            if fault is not None:
                whole[shard.first : end] = False
                report(fault)
        looks.append(_PackLook(source, np.flatnonzero(whole), pixels))
    for path in index.parent.glob("*.tar"):
        if path.name not in names:
            report(FaultError(str(path), "is no shard of this pack", "move it away", note=True))
    return looks


def _twins(looks: Sequence[_FolderLook | _PackLook], digests: list[bytes]) -> Iterator[FaultError]:
    """Notes of files with the same bytes."""
    joined = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    firsts = np.cumsum([0, *(len(look.rows) for look in looks)])
    order = np.lexsort((joined[:, 1], joined[:, 0]))
    same = (joined[order[1:]] == joined[order[:-1]]).all(1) & (joined[order[1:]] != 0).any(1)
    first = 0
    for place in np.flatnonzero(same):
        if place == 0 or not same[place - 1]:
            first = place
        sides = [int(np.searchsorted(firsts, order[at], "right")) - 1 for at in (first, place + 1)]
        here, there = (
            looks[side].place(int(order[at] - firsts[side])) for side, at in zip(sides, (first, place + 1), strict=True)
        )
        where = (
            "to train and to validate" if sides[0] != sides[1] else "in another class" if here[1] != there[1] else "too"
        )
        problem = f"has the same bytes as {here[0]}, {where}"
        yield FaultError(there[0], problem, "remove what has no place there", note=True)

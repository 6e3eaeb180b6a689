"""Everything that is wrong with a folder of images, its index, or a pack, found in one pass."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from onehour.data.dataset import FaultError
from onehour.data.decode import FORMATS, JPEG_START, PIXELS, decode, plain
from onehour.data.index import changes, folder_side, index_of, read_index
from onehour.data.listing import SIDES, Files, OnFault, Table, list_sides, read_file
from onehour.data.pack import PARTS
from onehour.data.processes import Done, spans, spread
from onehour.data.shards import Shards, key_of, label_member, pack_side

__all__ = ["examine", "inspect_image"]

SUFFIXES_OF = {
    "JPEG": (".jpeg", ".jpg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    "JPEG2000": (".jp2",),
}
SMALL, LONG = 8, 16
"""Pixels of the shorter side, and length in shorter sides, beyond which a crop would show almost nothing."""


def inspect_image(data: bytes, name: str, *, pixels: int) -> Iterator[FaultError]:
    """Everything that is wrong with an image file, and what a person should know of it as notes.

    Args:
        data, name, pixels: as of `decode`.
    """
    try:
        height, width = decode(data, name, pixels=pixels).shape[:2]
    except FaultError as fault:
        yield fault
        return
    if min(height, width) < SMALL or max(height, width) > LONG * min(height, width):
        yield FaultError(
            name, f"has {width}×{height} pixels", "look at it: a crop would show almost none of it", note=True
        )
    kind, frames = _kind_and_frames(data)
    suffixes = SUFFIXES_OF.get(kind)
    if suffixes and os.path.splitext(name)[1].lower() not in suffixes:
        yield FaultError(
            name, f"is {kind} by its content", f"nothing is lost; other tools expect {suffixes[0]}", note=True
        )
    if frames > 1 and kind != "MPO":
        yield FaultError(name, f"has {frames} frames", "nothing, if the first one is what you want", note=True)
    damage = _damage(data)
    if damage:
        yield FaultError(
            name, f"is damaged, and decoded as far as it goes: {damage}", "look at it, or replace it", note=True
        )


def _kind_and_frames(data: bytes) -> tuple[str, int]:
    """The format, and how many frames; "" and 1 where Pillow cannot say, since the first one was decoded."""
    kind = ""
    # What libjpeg-turbo reads Pillow may refuse, and its readers of damaged directories raise nearly anything.
    with (
        suppress(Exception),
        warnings.catch_warnings(action="ignore"),
        Image.open(io.BytesIO(plain(data)), formats=FORMATS) as image,
    ):
        kind = image.format or ""
        return kind, getattr(image, "n_frames", 1)
    return kind, 1


def _damage(data: bytes) -> str:
    """What libjpeg warns of and goes on."""
    if not data.startswith(JPEG_START):
        return ""
    try:
        if simplejpeg.decode_jpeg_header(data, strict=False)[2] in ("YCbCr", "Gray"):
            simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        return str(error)
    return ""


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
    """
    faults: list[FaultError] = []
    index = index_of(path)
    if index is None and not path.is_dir():
        expected = f"expected {path}/train/CLASS/* and {path}/val/CLASS/*, or a pack"
        return [FaultError(str(path), "is not a folder, an index or a pack", expected)]
    if index is None and ((path / PARTS).is_dir() or list(path.glob("*.tar"))):
        return [FaultError(str(path), "holds shards and no index: it was never finished", "pack the data again")]
    root, kind = path if path.is_dir() else path.parent, "folder"
    readers: list[_FolderReader] | list[_PackReader] = []
    try:
        if index is not None:
            _, about = read_index(index)
            root, kind = index.parent / str(about.get("root", ".")), about["kind"]
    except FaultError as fault:
        faults.append(fault)
        index = None
    try:
        if kind == "pack" and index is not None:
            readers = _pack_readers(index, pixels, faults.append)
        elif not list(root.glob("*.tar")):
            readers = _folder_readers(root, index, pixels, faults.append)
    except FaultError as fault:
        faults.append(fault)
    digests = []
    for reader in readers:
        found = spread(reader, spans(len(reader.rows), 64), jobs=jobs, done=done)
        faults += [fault for part, _ in found for fault in part]
        digests.append(b"".join(digest for _, digest in found))
    faults += _twins(readers, digests)
    return sorted(faults, key=lambda fault: fault.path)


@dataclass(frozen=True)
class _FolderReader:
    """Reads the files of a side; sent to the processes that do it."""

    source: Files
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
class _PackReader:
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


def _folder_readers(root: Path, index: Path | None, pixels: int, report: OnFault) -> list[_FolderReader]:
    tables = list_sides(root, report)
    readers = []
    arrays, about = read_index(index, verify=False) if index is not None else ({}, {})
    if index is not None:
        changes(index, report)
    for side, table in tables.items():
        known = folder_side(index, side, arrays, about, check=True).table if index is not None else None
        readers.append(_FolderReader(Files(root / side, table), _rows(table, known), known, pixels))
    return readers


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


def _pack_readers(index: Path, pixels: int, report: OnFault) -> list[_PackReader]:
    arrays, about = read_index(index, verify=False)
    readers, names = [], set()
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
        readers.append(_PackReader(source, np.flatnonzero(whole), pixels))
    for path in index.parent.glob("*.tar"):
        if path.name not in names:
            report(FaultError(str(path), "is not a shard of this pack", "move it away", note=True))
    return readers


def _twins(readers: Sequence[_FolderReader | _PackReader], digests: list[bytes]) -> Iterator[FaultError]:
    """Notes of files with the same bytes."""
    joined = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    firsts = np.cumsum([0, *(len(reader.rows) for reader in readers)])
    order = np.lexsort((joined[:, 1], joined[:, 0]))
    same = (joined[order[1:]] == joined[order[:-1]]).all(1) & (joined[order[1:]] != 0).any(1)
    first = 0
    for place in np.flatnonzero(same):
        if place == 0 or not same[place - 1]:
            first = place
        sides = [int(np.searchsorted(firsts, order[at], "right")) - 1 for at in (first, place + 1)]
        here, there = (
            readers[side].place(int(order[at] - firsts[side]))
            for side, at in zip(sides, (first, place + 1), strict=True)
        )
        where = (
            "to train and to validate" if sides[0] != sides[1] else "in another class" if here[1] != there[1] else "too"
        )
        problem = f"has the same bytes as {here[0]}, {where}"
        yield FaultError(there[0], problem, "remove what has no place there", note=True)

"""Everything that is wrong with a folder of images, its index, or a pack, found in one pass."""

from __future__ import annotations

import hashlib
import io
import tarfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from onehour.data.dataset import FaultError
from onehour.data.decode import FORMATS, JPEG_START, PIXELS, decode, plain
from onehour.data.index import Index, index_of, read_index
from onehour.data.listing import SIDES, SUFFIXES, Files, Table, expected, list_sides, read_file
from onehour.data.pack import PARTS, Shards, key_of, label_member, shards_of, suffix_of
from onehour.data.processes import Done, ignore, spans, spread

SMALL, LONG = 8, 16
"""Pixels of the shorter side, and length in shorter sides, beyond which a crop would show almost nothing."""


def inspect_image(data: bytes, name: str, *, pixels: int, suffix: str | None = None) -> Iterator[FaultError]:
    """Everything that is wrong with an image file, and what a person should know of it as notes.

    Args:
        suffix: what its name ends in, where that is not `name`'s.
    """
    suffix = suffix_of(name) if suffix is None else suffix
    note = partial(FaultError, name, note=True)
    try:
        height, width = decode(data, name, pixels=pixels).shape[:2]
    except FaultError as fault:
        yield fault
        return
    if min(height, width) < SMALL or max(height, width) > LONG * min(height, width):
        yield note(f"has {width}×{height} pixels", "look at it: a crop would show almost none of it")
    kind, frames = _kind_and_frames(data)
    suffixes = SUFFIXES.get(kind)
    if suffixes and suffix not in suffixes:
        yield note(f"is {kind} by its content", f"nothing is lost; other tools expect {suffixes[0]}")
    if frames > 1 and kind != "MPO":
        yield note(f"has {frames} frames", "nothing, if the first one is what you want")
    if damage := _damage(data):
        yield note(f"is damaged, and decoded as far as it goes: {damage}", "look at it, or replace it")


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
Seen = tuple[list[FaultError], bytes]
"""The faults of an image, and its file's bytes."""


def examine(path: Path, *, pixels: int = PIXELS, jobs: int = 1, done: Done = ignore) -> list[FaultError]:
    """What is wrong with the files of a folder of images or of a pack, in the order of paths; notes cost nothing."""
    place, index, root = index_of(path), None, path if path.is_dir() else path.parent
    if place is None and not path.is_dir():
        return [FaultError(str(path), "is not a folder, an index or a pack", f"{expected(path)}, or a pack")]
    if place is None and ((path / PARTS).is_dir() or list(path.glob("*.tar"))):
        return [FaultError(str(path), "holds shards and no index: it was never finished", "pack the data again")]
    faults: list[FaultError] = []
    sides: list[_Side] = []
    try:
        if place is not None:
            index = read_index(place)
            root = index.root
    except FaultError as fault:
        faults.append(fault)
    try:
        if index is not None and index.about["kind"] == "pack":
            sides = _of_pack(index, pixels, faults)
        elif not list(root.glob("*.tar")):
            sides = _of_folder(root, index, pixels, faults)
    except FaultError as fault:
        faults.append(fault)
    digests = []
    for side in sides:
        for found, part in spread(side, spans(len(side.images), 64), jobs=jobs, done=done):
            faults += found
            digests.append(part)
    faults += _twins(sides, np.frombuffer(b"".join(digests), f"S{DIGEST}"))
    return sorted(faults, key=lambda fault: fault.path)


@dataclass(frozen=True)
class _Side:
    """The images of a side that can be looked at, and how one is."""

    source: Files | Shards
    images: np.ndarray
    """Their indices."""
    look: Callable[[int], Seen]

    def __call__(self, span: range, done: Done) -> tuple[list[FaultError], bytes]:
        """The faults of some images, and a digest of each; zeros of one that cannot be read."""
        faults, digests = [], bytearray()
        for index in self.images[span.start : span.stop].tolist():
            data = b""
            try:
                found, data = self.look(index)
                faults += found
            except FaultError as fault:
                faults.append(fault)
            digests += hashlib.blake2b(data, digest_size=DIGEST).digest() if data else bytes(DIGEST)
            done(1)
        return faults, bytes(digests)


def _of_folder(root: Path, index: Index | None, pixels: int, faults: list[FaultError]) -> list[_Side]:
    tables = list_sides(root, faults)
    if index is not None:
        faults += index.changes()
    sides = []
    for side, table in tables.items():
        source, known = Files(root / side, table), index.table(side) if index is not None else None
        look = partial(_look_at_file, source, known, _rows(table, known), pixels)
        sides.append(_Side(source, np.arange(len(table)), look))
    return sides


def _rows(table: Table, known: Table | None) -> np.ndarray:
    """Of each image, its row in another table of the same files, or -1."""
    rows = np.full(len(table), -1)
    labels = {name: label for label, name in enumerate(known.classes)} if known is not None else {}
    for label, name in enumerate(table.classes):
        if known is not None and name in labels:
            theirs = known.by_name(labels[name])
            for file, index in table.by_name(label).items():
                rows[index] = theirs.get(file, -1)
    return rows


def _look_at_file(source: Files, known: Table | None, rows: np.ndarray, pixels: int, index: int) -> Seen:
    name, row = source.name(index), int(rows[index])
    data = read_file(name)
    if known is not None and row >= 0:
        known.verify(row, data, lambda _: name)
    return list(inspect_image(data, name, pixels=pixels)), data


def _of_pack(index: Index, pixels: int, faults: list[FaultError]) -> list[_Side]:
    sides, names = [], set()
    for side in SIDES:
        source = shards_of(index, side)
        names |= {shard.name for shard in source.shards}
        whole = np.ones(len(source.labels), bool)
        ends = [*(shard.first for shard in source.shards[1:]), len(whole)]
        for number, fault in source.faults().items():
            whole[source.shards[number].first : ends[number]] = False
            faults.append(fault)
        sides.append(_Side(source, np.flatnonzero(whole), partial(_look_at_sample, source, pixels)))
    for path in index.path.parent.glob("*.tar"):
        if path.name not in names:
            faults.append(FaultError(str(path), "is not a shard of this pack", "move it elsewhere", note=True))
    return sides


def _look_at_sample(source: Shards, pixels: int, index: int) -> Seen:
    name, label = source.name(index), int(source.labels[index])
    head, behind = source.members(index)
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
        faults.append(FaultError(name, f"is not followed by its label {label} in the shard", remedy))
    data = source.read(index)
    return faults + list(inspect_image(data, name, pixels=pixels, suffix=suffix_of(member.name))), data


def _twins(sides: list[_Side], digests: np.ndarray) -> Iterator[FaultError]:
    """Notes of files with the same bytes as one before."""
    _, firsts, groups = np.unique(digests, return_index=True, return_inverse=True)
    ends = np.cumsum([len(side.images) for side in sides])

    def place(row: int) -> tuple[int, str, str]:
        """Its side, its path and its class."""
        number = int(np.searchsorted(ends, row, "right"))
        source, images = sides[number].source, sides[number].images
        index = int(images[row - ends[number]])  # from behind
        return number, source.name(index), source.classes[source.labels[index]]

    for row in np.flatnonzero((firsts[groups] != np.arange(len(digests))) & (digests != b"")).tolist():
        first, again = place(int(firsts[groups[row]])), place(row)
        other = "in another class" if first[2] != again[2] else "too"
        where = "to train and to validate" if first[0] != again[0] else other
        problem = f"has the same bytes as {first[1]}, {where}"
        yield FaultError(again[1], problem, "remove what does not belong there", note=True)

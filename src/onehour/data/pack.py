"""Packing labelled images: some large tar files in place of a million small ones, and where in them each image lies.

Images that are made smaller before are faster to decode, and no longer the pixels that the paper trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from onehour.data.augment import resized
from onehour.data.dataset import FaultError
from onehour.data.decode import PIXELS, decode, orientation_of
from onehour.data.index import FORMAT, INDEX, columns, open_arrays, read_index, write_arrays
from onehour.data.listing import Files
from onehour.data.processes import Done, spread
from onehour.data.shards import BLOCK, END, Shards, header, key_of, label_member, padding
from onehour.files import opened, remove, replace_whole, sync_folder, written
from onehour.lock import HeldFolder, OpenFolder
from onehour.messages import shown

__all__ = ["QUALITY", "SHARD_BYTES", "pack", "parts_of", "shrunk"]

QUALITY = 95
LONGEST = 65_500
"""Pixels of a side that libjpeg writes."""


def shrunk(data: bytes, name: str, shorter: int, *, pixels: int = PIXELS) -> bytes | None:
    """An image file whose shorter side is `shorter`, as JPEG of quality 95; None for one that is not larger.

    The aspect is kept, the resize is bilinear and antialiased as the crops' is. An EXIF orientation is kept, other
    metadata is not.

    Args:
        data, name, pixels: as of `decode`.
        shorter: pixels.

    Raises:
        FaultError: if the image cannot be decoded, or is too long for a JPEG even so.
    """
    image = decode(data, name, pixels=pixels)
    height, width = image.shape[:2]
    side = min(height, width)
    if side <= shorter:
        return None
    height, width = round(height * shorter / side), round(width * shorter / side)
    if max(height, width) > LONGEST:
        raise FaultError(
            name, f"would have {width}×{height} pixels, too many for a JPEG", "pack as it is, or remove it"
        )
    smaller = resized(image, height, width)
    encoded = simplejpeg.encode_jpeg(smaller, quality=QUALITY, colorspace="RGB", colorsubsampling="420")
    orientation = orientation_of(data)
    if orientation == 1:
        return encoded
    # The smallest EXIF block: TIFF's header, one entry (tag, type SHORT, one value), no further directory.
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01" + bytes([0, orientation, 0, 0])
    block = b"Exif\0\0MM\0*\0\0\0\x08\x00\x01" + entry + bytes(4)
    return encoded[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + encoded[2:]


SHARD_BYTES = 2**30
SHARD = re.compile(r"(train|val)-\d{5,}\.tar", re.ASCII)
PARTS = ".parts"
"""The folder inside a pack, while it is made, that says what each finished shard holds."""


@dataclass(frozen=True)
class Part:
    """A shard to be written: the samples `span` of a side."""

    side: str
    number: int
    span: range

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.side}-{self.number:05d}.tar"


def pack(
    sides: Mapping[str, Files | Shards],
    out: Path,
    *,
    resize: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    jobs: int = 1,
    done: Done = lambda items: None,
) -> Path:
    """Write a pack, or finish one that was interrupted: shards that are there are kept.

    Args:
        sides: by "train" and "val", with the sizes of their files known.
        out: its folder; new, empty, or of the same pack.
        resize: make the shorter side of larger images this many pixels; else every file's bytes stay as they are.
        shard_bytes: a shard is closed when its files reach this.
        jobs: processes to write with.
        done: is told of every image.

    Returns:
        The pack's index.

    Raises:
        ValueError: if `out` holds something else, an image cannot be read or resized, or the disk is full.
    """
    for source in sides.values():
        if isinstance(source, Files) and out.resolve().is_relative_to(Path(source.root).resolve()):
            raise ValueError(f"{out} lies inside the data to pack; choose a folder outside of {source.root}")
    packing = _Packing(dict(sides), out, resize)
    parts = [part for side, source in sides.items() for part in parts_of(side, source.table.sizes, shard_bytes)]
    prints = {part.name: packing.fingerprint(part) for part in parts}
    whole = hashlib.sha256("".join(prints.values()).encode()).hexdigest()
    try:
        with HeldFolder(out, patience=0, option="OUT") as held:
            packing = replace(packing, held=held)
            if _is_done(out, whole):
                remove(out, PARTS)
                return out / INDEX
            _clear(out, prints)
            if resize is None:
                _refuse_full_disk(out, packing, parts)
            spread(packing.write, parts, jobs=jobs, done=done)
            held.check()
            return _finish(packing, parts, whole)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}; {AGAIN}") from error


AGAIN = "finished shards are kept, and the same command goes on with the rest"


def parts_of(side: str, sizes: np.ndarray | None, shard_bytes: int) -> list[Part]:
    """The samples of a side in shards: each is closed when its files reach `shard_bytes`.

    >>> [part.span for part in parts_of("val", np.array([3, 3, 3]), 6)]
    [range(0, 2), range(2, 3)]
    """
    assert sizes is not None
    ends = np.cumsum(sizes)
    spans, first = [], 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = min(int(np.searchsorted(ends, before + shard_bytes)) + 1, len(sizes))
        spans.append(range(first, last))
        first = last
    return [Part(side, number, span) for number, span in enumerate(spans)]


@dataclass(frozen=True)
class _Packing:
    """What every shard of a pack has in common; sent to the processes that write."""

    sides: dict[str, Files | Shards]
    out: Path
    resize: int | None
    held: OpenFolder | None = None

    def fingerprint(self, part: Part) -> str:
        """Of all that decides a shard's bytes, but for the files' own."""
        table, span = self.sides[part.side].table, part.span
        assert table.sizes is not None
        settings = [FORMAT, part.name, span.start, span.stop, table.classes]
        settings += [self.resize, QUALITY] if self.resize else []
        digest = hashlib.sha256(json.dumps(settings).encode())
        digest.update(np.ascontiguousarray(table.labels[span.start : span.stop]).data)
        digest.update(np.ascontiguousarray(table.sizes[span.start : span.stop]).data)
        ends = table.names.ends[span.start : span.stop + 1]
        digest.update((ends - ends[0]).data)
        digest.update(np.ascontiguousarray(table.names.buffer[ends[0] : ends[-1]]).data)
        return digest.hexdigest()

    def write(self, part: Part, done: Done) -> None:
        """Write one shard, unless it is there, and what it holds into `PARTS`."""
        if self.held is not None:
            self.held.check()
        fingerprint = self.fingerprint(part)
        if self.finished(part, fingerprint):
            done(len(part.span))
            return
        source = self.sides[part.side]
        offsets, sizes, checks = (np.zeros(len(part.span), kind) for kind in (np.int64, np.int64, np.uint32))
        try:
            with written(self.out, part.name) as file:
                for row, index in enumerate(part.span):
                    data, suffix = self._content(source, index)
                    file.write(header(key_of(index).decode() + suffix, len(data)))
                    offsets[row], sizes[row], checks[row] = file.tell(), len(data), zlib.crc32(data)
                    file.write(data)
                    file.write(padding(len(data)))
                    file.write(label_member(index, int(source.labels[index])))
                    done(1)
                file.write(END)
                size = file.tell()
                about = {"fingerprint": fingerprint, "bytes": size}
                write_arrays(self._record(part), {"offsets": offsets, "sizes": sizes, "checks": checks}, about)
        except OSError as error:
            if self.held is not None:
                self.held.check()
            raise ValueError(f"{self.out / part.name} cannot be written: {error.strerror}; {AGAIN}") from error

    def finished(self, part: Part, fingerprint: str) -> bool:
        """Whether an earlier command wrote this very shard to its end."""
        try:
            about = open_arrays(self._record(part))[1]
            return (about["fingerprint"], about["bytes"]) == (fingerprint, (self.out / part.name).stat().st_size)
        except (ValueError, KeyError, TypeError, OSError):
            return False

    def records(self, part: Part) -> tuple[dict[str, np.ndarray], int]:
        """What a finished shard holds, and its bytes."""
        arrays, about = open_arrays(self._record(part))
        return arrays, about["bytes"]

    def _record(self, part: Part) -> Path:
        return self.out / PARTS / part.name

    def _content(self, source: Files | Shards, index: int) -> tuple[bytes, str]:
        """An image file's bytes as they are packed, and the suffix that fits them."""
        data = source.read(index)
        smaller = shrunk(data, source.name(index), self.resize) if self.resize else None
        if smaller is not None:
            return smaller, "jpg"
        return data, os.path.splitext(source.table.names[index])[1].lower().lstrip(".")


def _finish(packing: _Packing, parts: list[Part], whole: str) -> Path:
    """The pack's index, from what its shards hold."""
    arrays: dict[str, np.ndarray] = {}
    shards: dict[str, list[tuple[str, int, int]]] = {side: [] for side in packing.sides}
    found: dict[str, list[dict[str, np.ndarray]]] = {side: [] for side in packing.sides}
    for part in parts:
        record, size = packing.records(part)
        found[part.side].append(record)
        shards[part.side].append((part.name, part.span.start, size))
    for side, source in packing.sides.items():
        arrays |= columns(side, source.table, None)
        for name in ("offsets", "sizes", "checks"):
            arrays[f"{side}.{name}"] = np.concatenate([record[name] for record in found[side]])
    classes = packing.sides["train"].classes
    sizes = [packing.resize, *(source.resized for source in packing.sides.values())]
    about: dict[str, Any] = {
        "format": FORMAT,
        "kind": "pack",
        "classes": classes,
        "shards": shards,
        "resized": min((side for side in sizes if side), default=None),
        "quality": QUALITY if packing.resize else None,
        "fingerprint": whole,
    }
    replace_whole(packing.out, "classes.txt", "".join(f"{shown(name)}\n" for name in classes))
    sync_folder(packing.out)  # the shards are there before the index says so
    write_arrays(packing.out / INDEX, arrays, about)
    remove(packing.out, PARTS)
    return packing.out / INDEX


def _is_done(out: Path, whole: str) -> bool:
    """Whether this very pack is there, with all its shards.

    Raises:
        ValueError: if something else is.
    """
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if (out / INDEX).is_file():
        about = read_index(out / INDEX)[1]
        if about.get("fingerprint") != whole:
            raise ValueError(f"{out} holds a pack of other data or another --resize; choose another folder")
        shards = [(out / name, size) for side in about["shards"].values() for name, _, size in side]
        return all(path.is_file() and path.stat().st_size == size for path, size in shards)
    if others and not (out / PARTS).is_dir():
        raise ValueError(f"{out} holds other files ({shown(others[0])} …); choose a new folder")
    return False


def _clear(out: Path, prints: dict[str, str]) -> None:
    """Remove what an interrupted command left that has no place in this pack."""
    with opened(out, PARTS, make=True) as parts:
        for name in os.listdir(parts):
            if name not in prints:
                if SHARD.fullmatch(name):
                    remove(out, name)
                remove(parts, name)
    for name in os.listdir(out):
        if SHARD.fullmatch(name.removeprefix(".").removesuffix(".writing")) and name.startswith("."):
            remove(out, name)


def _refuse_full_disk(out: Path, packing: _Packing, parts: list[Part]) -> None:
    needed = 0
    for part in parts:
        if not packing.finished(part, packing.fingerprint(part)):
            sizes = packing.sides[part.side].table.sizes
            assert sizes is not None
            chosen = sizes[part.span.start : part.span.stop]
            needed += int((-(-chosen // BLOCK) * BLOCK).sum()) + 3 * BLOCK * len(chosen)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"{out} needs {needed:,} bytes more, its disk has {free:,}; make room, or pack with --resize")

"""A pack: labelled images in a few large tar files in place of a million small ones, and an index of where each lies.

A sample is two members of a shard, as WebDataset names them: 00000042.jpg with the image's bytes and 00000042.cls with
its label as text. Every member is one header block of 512 bytes and its content, filled up to whole blocks. Shards are
read at offsets that the index knows, never extracted. Images that were made smaller are faster to decode, and no longer
the pixels that the paper trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from onehour.data.dataset import FaultError
from onehour.data.decode import PIXELS, QUALITY, shrunk
from onehour.data.index import FORMAT, INDEX, Index, columns, open_arrays, read_index, write_arrays
from onehour.data.listing import Files, Table
from onehour.data.processes import Done, ignore, spread
from onehour.files import opened, remove, replace_whole, sync_folder, written
from onehour.lock import HeldFolder, OpenFolder
from onehour.messages import shown

BLOCK = 512
OPEN = 64
"""Shards that a process keeps open."""
END = bytes(2 * BLOCK)
"""Two empty blocks end an archive."""
TOGETHER = "restore the shard and the index that belong together"


class Shard(NamedTuple):
    """A shard's place in its pack: its file, the index of its first sample, and its bytes."""

    name: str
    first: int
    size: int


class Shards:
    """One side of a pack.

    Args:
        table: its images; sizes and checks are known.
        offsets: int64 (N,), where in its shard each image's bytes begin.
        shards: in the order of their samples.
        resized: the shorter side that larger images were resized to; None if they are as they were.
    """

    def __init__(
        self, root: Path, table: Table, offsets: np.ndarray, shards: list[Shard], resized: int | None = None
    ) -> None:
        self.root, self.table, self.offsets, self.shards, self.resized = root, table, offsets, shards, resized
        self.classes, self.labels = table.classes, table.labels
        self._firsts = [shard.first for shard in shards]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Shards, (self.root, self.table, self.offsets, self.shards, self.resized)  # without the open files

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def name(self, index: int) -> str:
        """The shard of image `index`, and the file that it was."""
        return f"{self.root / self.shards[self._shard(index)].name}: {self.table.where(index)}"

    def read(self, index: int) -> bytes:
        size, offset = int(_sizes(self.table)[index]), int(self.offsets[index])
        block = self._pread(index, BLOCK + size, offset - BLOCK)
        if not block.startswith(key_of(index)):
            problem = f"is not where the index says: there is {_member(block)}, not {key_of(index).decode()}*"
            raise FaultError(self.name(index), problem, TOGETHER)
        return self.table.verify(index, block[BLOCK:], self.name)

    def members(self, index: int) -> tuple[bytes, bytes]:
        """The header before image `index`, and the label's member behind it; FaultError if they cannot be read."""
        size, offset = int(_sizes(self.table)[index]), int(self.offsets[index])
        behind = offset + size + len(_padding(size))
        return self._pread(index, BLOCK, offset - BLOCK), self._pread(index, 2 * BLOCK, behind)

    def suffix(self, index: int) -> str:
        """Of image `index`'s member: a smaller image is no longer of the kind that its file was."""
        return suffix_of(_member_name(self.members(index)[0]))

    def faults(self) -> dict[int, FaultError]:
        """What is wrong with shards as a whole, by their size and their first member: of each that is not sound."""
        found = ((number, self._fault(number, shard)) for number, shard in enumerate(self.shards))
        return {number: fault for number, fault in found if fault is not None}

    def _fault(self, number: int, shard: Shard) -> FaultError | None:
        path, remedy = str(self.root / shard.name), f"{TOGETHER}, or pack the data again"
        try:
            file = self._file(number)
            size, block = os.fstat(file).st_size, os.pread(file, BLOCK, 0)
        except OSError as error:
            return FaultError(path, f"cannot be read: {error.strerror}", remedy)
        if size != shard.size:
            return FaultError(path, f"has {size:,} bytes, {shard.size:,} by the pack's index", remedy)
        if not block.startswith(key_of(shard.first)):
            key = key_of(shard.first).decode()
            return FaultError(path, f"begins with {_member(block)}, by the pack's index with {key}*", remedy)
        return None

    def _pread(self, index: int, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._file(self._shard(index)), size, offset)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            raise FaultError(self.name(index), problem, "restore the shard, or start without it") from error

    def _shard(self, index: int) -> int:
        return bisect_right(self._firsts, index) - 1

    def _file(self, number: int) -> int:
        file = self._files.get(number)
        if file is None:
            path = self.root / self.shards[number].name
            file = self._files[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if len(self._files) > OPEN:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(number)
        return file


def shards_of(index: Index, side: str) -> Shards:
    """One side of a pack; whether the shards are there is for `Shards.faults`.

    A FaultError if the index holds what no packing would have written: names or offsets that lead elsewhere.
    """
    table, about = index.table(side), index.about
    try:
        shards = [Shard(str(name), int(first), int(size)) for name, first, size in about["shards"][side]]
    except (TypeError, ValueError) as error:
        raise FaultError(str(index.path), "is not a complete index", "make it again") from error
    offsets = index.arrays.get(f"{side}.offsets", np.zeros(0, np.int64))
    sizes, firsts = _sizes(table), [shard.first for shard in shards]
    sound = (
        table.checks is not None
        and all(Path(shard.name).name == shard.name and shard.name.endswith(".tar") for shard in shards)
        and len(offsets) == len(sizes)
        and firsts == sorted(set(firsts))
        and firsts[:1] == [0]
        and firsts[-1] < len(sizes)
    )
    if sound:
        ends = np.repeat([shard.size for shard in shards], np.diff([*firsts, len(sizes)]))
        sound = bool((offsets >= BLOCK).all() and (offsets + sizes <= ends).all())
    if not sound:
        raise FaultError(str(index.path), "has offsets or shards that no pack would have", "pack the data again")
    return Shards(index.path.parent, table, offsets, shards, about.get("resized"))


def suffix_of(name: str) -> str:
    """.jpg of x.JPG"""
    return os.path.splitext(name)[1].lower()


def key_of(index: int) -> bytes:
    """What the names of sample `index`'s members begin with: b"00000042." of 42."""
    return b"%08d." % index


def label_member(index: int, label: int) -> bytes:
    """The two blocks with sample `index`'s label."""
    text = b"%d" % label
    return _header((key_of(index) + b"cls").decode(), len(text)) + text + _padding(len(text))


def _header(name: str, size: int) -> bytes:
    """The block before a member's content, the same at any time on any machine."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _member(block: bytes) -> str:
    return repr(_member_name(block)) if block.strip(b"\0") else "nothing"


def _member_name(block: bytes) -> str:
    return block[:100].partition(b"\0")[0].decode("utf-8", "replace")


SHARD_BYTES = 2**30
SHARD = re.compile(r"(train|val)-\d{5,}\.tar", re.ASCII)
PARTS = ".parts"
"""The folder inside a pack, while it is made, that says what each finished shard holds."""
AGAIN = "finished shards are kept, and the same command goes on with the rest"


def pack(
    sides: Mapping[str, Files | Shards],
    out: Path,
    *,
    resize: int | None = None,
    pixels: int = PIXELS,
    shard_bytes: int = SHARD_BYTES,
    jobs: int = 1,
    done: Done = ignore,
) -> Path:
    """Write a pack, or finish one that was interrupted: shards that are there are kept.

    Args:
        resize: make the shorter side of larger images this many pixels; else every file's bytes stay as they are.
        pixels: the most of an image that is made smaller, as for `decode`.
        shard_bytes: a shard is closed when its files reach this.
    """
    for source in sides.values():
        if isinstance(source, Files) and out.resolve().is_relative_to(Path(source.root).resolve()):
            raise ValueError(f"{out} lies inside the data to pack; choose a folder outside of {source.root}")
    parts = [
        _Part(out, source, side, number, span, resize, pixels)
        for side, source in sides.items()
        for number, span in enumerate(split(_sizes(source.table), shard_bytes))
    ]
    whole = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
    try:
        with HeldFolder(out, patience=0, option="OUT") as held:
            if _is_done(out, whole):
                remove(out, PARTS)
                return out / INDEX
            _clear(out, {part.name for part in parts})
            if resize is None:
                _refuse_full_disk(out, parts)
            records = spread(partial(_write, parts, held), range(len(parts)), jobs=jobs, done=done)
            held.check()
            return _finish(out, sides, parts, records, whole)
    except OSError as error:
        raise ValueError(f"{out} cannot be written: {error.strerror or error}; {AGAIN}") from error


def split(sizes: np.ndarray, shard_bytes: int) -> list[range]:
    """The samples of a side in shards: each is closed when its files reach `shard_bytes`."""
    ends = np.cumsum(sizes)
    spans, first = [], 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        last = min(int(np.searchsorted(ends, before + shard_bytes)) + 1, len(sizes))
        spans.append(range(first, last))
        first = last
    return spans


Record = tuple[dict[str, np.ndarray], int]
"""Of each sample of a shard the offset, the size and the CRC-32 of its file; and the shard's bytes."""


@dataclass(frozen=True)
class _Part:
    """A shard to be written: the samples `span` of a side."""

    out: Path
    source: Files | Shards
    side: str
    number: int
    span: range
    resize: int | None
    pixels: int

    @property
    def name(self) -> str:
        return f"{self.side}-{self.number:05d}.tar"

    @property
    def sizes(self) -> np.ndarray:
        return _sizes(self.source.table)[self.span.start : self.span.stop]

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides the shard's bytes, but for the files' own."""
        table, span = self.source.table, self.span
        settings = [FORMAT, self.name, span.start, span.stop, table.classes]
        settings += [self.resize, QUALITY] if self.resize else []
        digest = hashlib.sha256(json.dumps(settings).encode())
        ends = table.names.ends[span.start : span.stop + 1]
        labels, names = table.labels[span.start : span.stop], table.names.buffer[ends[0] : ends[-1]]
        for array in (labels, self.sizes, ends - ends[0], names):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def finished(self) -> Record | None:
        """What an earlier command noted of this very shard, if it wrote it to its end."""
        try:
            arrays, about = open_arrays(self.out / PARTS / self.name)
            known = (about["fingerprint"], about["bytes"]) == (self.fingerprint, (self.out / self.name).stat().st_size)
            return (arrays, about["bytes"]) if known else None
        except (ValueError, KeyError, TypeError, OSError):
            return None

    def write(self, done: Done) -> Record:
        """Write the shard, and what it holds into `PARTS`."""
        offsets, sizes, checks = (np.zeros(len(self.span), kind) for kind in (np.int64, np.int64, np.uint32))
        with written(self.out, self.name) as file:
            for row, index in enumerate(self.span):
                data, suffix = self._content(index)
                file.write(_header(key_of(index).decode() + suffix, len(data)))
                offsets[row], sizes[row], checks[row] = file.tell(), len(data), zlib.crc32(data)
                file.write(data + _padding(len(data)) + label_member(index, int(self.source.labels[index])))
                done(1)
            file.write(END)
            arrays, size = {"offsets": offsets, "sizes": sizes, "checks": checks}, file.tell()
            write_arrays(self.out / PARTS / self.name, arrays, {"fingerprint": self.fingerprint, "bytes": size})
        return arrays, size

    def _content(self, index: int) -> tuple[bytes, str]:
        data = self.source.read(index)
        if self.resize:
            smaller = shrunk(data, self.source.name(index), self.resize, pixels=self.pixels)
            if smaller is not None:
                return smaller, "jpg"
        source = self.source
        suffix = source.suffix(index) if isinstance(source, Shards) else suffix_of(source.table.names[index])
        return data, suffix.lstrip(".")


def _write(parts: list[_Part], held: OpenFolder, number: int, done: Done) -> Record:
    held.check()
    part = parts[number]
    if (found := part.finished()) is not None:
        done(len(part.span))
        return found
    try:
        return part.write(done)
    except OSError as error:
        held.check()
        raise ValueError(f"{part.out / part.name} cannot be written: {error.strerror}; {AGAIN}") from error


def _finish(
    out: Path, sides: Mapping[str, Files | Shards], parts: list[_Part], records: list[Record], whole: str
) -> Path:
    """The pack's index, from what its shards hold."""
    arrays: dict[str, np.ndarray] = {}
    shards: dict[str, list[Shard]] = {}
    for side, source in sides.items():
        arrays |= columns(side, source.table, None)
        own = [(part, *record) for part, record in zip(parts, records, strict=True) if part.side == side]
        shards[side] = [Shard(part.name, part.span.start, size) for part, _, size in own]
        for name in ("offsets", "sizes", "checks"):
            arrays[f"{side}.{name}"] = np.concatenate([record[name] for _, record, _ in own])
    classes, resize = sides["train"].classes, parts[0].resize
    smaller = [side for side in (resize, *(source.resized for source in sides.values())) if side]
    about: dict[str, Any] = {
        "format": FORMAT,
        "kind": "pack",
        "classes": classes,
        "shards": shards,
        "resized": min(smaller, default=None),
        "quality": QUALITY if resize else None,
        "fingerprint": whole,
    }
    replace_whole(out, "classes.txt", "".join(f"{shown(name)}\n" for name in classes))
    sync_folder(out)  # the shards are there before the index says so
    write_arrays(out / INDEX, arrays, about)
    remove(out, PARTS)
    return out / INDEX


def _is_done(out: Path, whole: str) -> bool:
    """Whether this very pack is there, with all its shards; a ValueError if something else is."""
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if (out / INDEX).is_file():
        about = read_index(out / INDEX).about
        if about.get("fingerprint") != whole:
            raise ValueError(f"{out} holds a pack of other data or another --resize; choose another folder")
        shards = [(out / name, size) for side in about["shards"].values() for name, _, size in side]
        return all(path.is_file() and path.stat().st_size == size for path, size in shards)
    if others and not (out / PARTS).is_dir():
        raise ValueError(f"{out} holds other files ({shown(others[0])} …); choose a new folder")
    return False


def _clear(out: Path, names: set[str]) -> None:
    with opened(out, PARTS, make=True) as parts:
        for name in os.listdir(parts):
            if name not in names:
                if SHARD.fullmatch(name):
                    remove(out, name)
                remove(parts, name)
    for name in os.listdir(out):
        if SHARD.fullmatch(name.removeprefix(".").removesuffix(".writing")) and name.startswith("."):
            remove(out, name)


def _refuse_full_disk(out: Path, parts: list[_Part]) -> None:
    sizes = [part.sizes for part in parts if part.finished() is None]
    needed = sum(int((-(-size // BLOCK) * BLOCK).sum()) + 3 * BLOCK * len(size) for size in sizes)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(f"{out} needs {needed:,} bytes more, its disk has {free:,}; make room, or pack with --resize")


def _sizes(table: Table) -> np.ndarray:
    assert table.sizes is not None
    return table.sizes

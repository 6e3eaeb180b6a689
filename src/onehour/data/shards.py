"""The shards of a pack: plain tar files, read at offsets that the pack's index knows, never extracted.

A sample is two members, as WebDataset names them: 00000042.jpg with the image's bytes and 00000042.cls with its label
as text. Every member is one header block of 512 bytes and its content, filled up to whole blocks.
"""

from __future__ import annotations

import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onehour.data.dataset import FaultError
from onehour.data.index import reopened, table_of
from onehour.data.listing import Table

__all__ = ["BLOCK", "Shard", "Shards", "header", "key_of", "label_member", "pack_side", "padding"]

BLOCK = 512
OPEN = 64
"""Shards that a process keeps open."""
END = bytes(2 * BLOCK)
"""Two empty blocks end an archive."""


class Shard:
    """A shard's place in its pack.

    Args:
        name: of its file.
        first: the index of its first sample.
        size: its bytes.
    """

    def __init__(self, name: str, first: int, size: int) -> None:
        self.name, self.first, self.size = name, first, size


class Shards:
    """One side of a pack.

    Args:
        root: the pack's folder.
        table: its images; sizes and checks are known.
        offsets: int64 (N,), where in its shard each image's bytes begin.
        shards: in the order of their samples.
        resized: the shorter side that larger images were resized to; None if they are as they were.
        reopen: gives this same side in another process.
    """

    def __init__(
        self,
        root: Path,
        table: Table,
        offsets: np.ndarray,
        shards: list[Shard],
        *,
        resized: int | None = None,
        reopen: Callable[[], Shards] | None = None,
    ) -> None:
        self.root, self.table, self.offsets, self.shards, self.resized = root, table, offsets, shards, resized
        self.classes, self.labels = table.classes, table.labels
        self._reopen = reopen
        self._firsts = [shard.first for shard in shards]
        self._files: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        assert self._reopen is not None
        return self._reopen, ()

    def __del__(self) -> None:
        for file in self._files.values():
            os.close(file)

    def name(self, index: int) -> str:
        """The shard of image `index`, and the file that it was."""
        return f"{self.root / self.shards[self._shard(index)].name}: {self.table.where(index)}"

    def read(self, index: int) -> bytes:
        """The bytes of image `index`.

        Raises:
            FaultError: naming shard and file, if the shard cannot be read or holds something else there.
        """
        number = self._shard(index)
        size, offset = int(self.table.sizes[index]), int(self.offsets[index])  # type: ignore[index]
        try:
            block = os.pread(self._file(number), BLOCK + size, offset - BLOCK)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            raise FaultError(self.name(index), problem, "restore the shard, or start without it") from error
        if not block.startswith(key_of(index)):
            problem = f"is not where the index has it: there is {_member(block)}, not {key_of(index).decode()}*"
            raise FaultError(self.name(index), problem, "restore the shard and the index that belong together")
        return self.table.verify(index, block[BLOCK:], self.name)

    def members(self, index: int) -> tuple[bytes, bytes]:
        """The header before image `index`, and the label's member behind it.

        Raises:
            FaultError: if the shard cannot be read.
        """
        number = self._shard(index)
        offset, size = int(self.offsets[index]), int(self.table.sizes[index])  # type: ignore[index]
        behind = offset + size + len(padding(size))
        try:
            file = self._file(number)
            return os.pread(file, BLOCK, offset - BLOCK), os.pread(file, 2 * BLOCK, behind)
        except OSError as error:
            problem = f"cannot be read: {error.strerror}"
            raise FaultError(self.name(index), problem, "restore the shard") from error

    def check(self) -> None:
        """Look at every shard's size and first member.

        Raises:
            FaultError: naming the first shard that is not the index's.
        """
        for number, shard in enumerate(self.shards):
            fault = self.shard_fault(number, shard)
            if fault:
                raise fault

    def shard_fault(self, number: int, shard: Shard) -> FaultError | None:
        """What is wrong with a shard as a whole, by its size and its first member; None for nothing."""
        path = str(self.root / shard.name)
        remedy = "restore the shard and the index that belong together, or pack the data again"
        try:
            file = self._file(number)
            size, block = os.fstat(file).st_size, os.pread(file, BLOCK, 0)
        except OSError as error:
            return FaultError(path, f"cannot be read: {error.strerror}", remedy)
        if size != shard.size:
            return FaultError(path, f"has {size:,} bytes, {shard.size:,} by the pack's index", remedy)
        if not block.startswith(key_of(shard.first)):
            expected = key_of(shard.first).decode()
            return FaultError(path, f"begins with {_member(block)}, by the pack's index with {expected}*", remedy)
        return None

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


def pack_side(
    path: Path, side: str, arrays: dict[str, np.ndarray], about: dict[str, Any], *, check: bool = False
) -> Shards:
    """One side of a pack.

    Args:
        path: the pack's index.
        arrays, about: what is in it.
        check: look at every entry; the shards are for `Shards.check`.

    Raises:
        FaultError: if the index is not sound.
    """
    table = table_of(path, side, arrays, about["classes"], check=check)
    try:
        shards = [Shard(str(name), int(first), int(size)) for name, first, size in about["shards"][side]]
    except (TypeError, ValueError) as error:
        raise FaultError(str(path), "is not a complete index", "make it again") from error
    offsets = arrays.get(f"{side}.offsets", np.zeros(0, np.int64))
    reopen = partial(reopened, pack_side, path, side)
    source = Shards(path.parent, table, offsets, shards, resized=about.get("resized"), reopen=reopen)
    if check:
        _refuse_wrong(path, source)
    return source


def _refuse_wrong(path: Path, source: Shards) -> None:
    """Refuse what no packing would have written: names that lead elsewhere, offsets outside their shard."""
    sizes, checks, firsts = source.table.sizes, source.table.checks, [shard.first for shard in source.shards]
    assert sizes is not None
    sound = (
        checks is not None
        and all(Path(shard.name).name == shard.name and shard.name.endswith(".tar") for shard in source.shards)
        and len(source.offsets) == len(sizes)
        and firsts == sorted(set(firsts))
        and firsts[:1] == [0]
        and firsts[-1] < len(sizes)
    )
    if sound:
        counts = np.diff(np.array([*firsts, len(sizes)]))
        ends = np.repeat([shard.size for shard in source.shards], counts)
        sound = bool((source.offsets >= BLOCK).all() and (source.offsets + sizes <= ends).all())
    if not sound:
        raise FaultError(str(path), "has offsets or shards that no pack would have", "pack the data again")


def key_of(index: int) -> bytes:
    """What the name of sample `index`'s members begins with.

    >>> key_of(42)
    b'00000042.'
    """
    return b"%08d." % index


def header(name: str, size: int) -> bytes:
    """The block before a member's content, the same at any time on any machine."""
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT)


def label_member(index: int, label: int) -> bytes:
    """The two blocks with sample `index`'s label.

    >>> label_member(42, 7)[512:514]
    b'7\\x00'
    """
    text = b"%d" % label
    return header((key_of(index) + b"cls").decode(), len(text)) + text + padding(len(text))


def padding(size: int) -> bytes:
    """Zeros that fill a content up to whole blocks."""
    return bytes(-size % BLOCK)


def _member(block: bytes) -> str:
    return repr(block[:100].partition(b"\0")[0].decode("utf-8", "replace")) if block.strip(b"\0") else "nothing"

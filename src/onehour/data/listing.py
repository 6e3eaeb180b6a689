"""What lies in a folder of images: ROOT/train/CLASS/* and ROOT/val/CLASS/*, in the order of names.

Names, labels and sizes of one side are arrays, never a million Python objects. Where the files' bytes come from is a
source: a folder here, a pack's shards in pack.py.
"""

from __future__ import annotations

import os
import stat
import unicodedata
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onehour.data.dataset import FaultError
from onehour.data.processes import Done, ignore
from onehour.messages import shown


class Names:
    """Many short texts in two arrays, `buffer` and `ends`: a million cost their bytes."""

    def __init__(self, buffer: np.ndarray, ends: np.ndarray) -> None:
        self.buffer, self.ends = buffer, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Pack names."""
        buffer, ends = bytearray(), array("q", [0])
        for name in names:
            buffer += os.fsencode(name)
            ends.append(len(buffer))
        return cls(np.frombuffer(bytes(buffer), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.buffer[self.ends[index] : self.ends[index + 1]].tobytes())

    def safe(self) -> bool:
        """Whether every text is the name of a file in some folder: not empty, no path, neither "." nor ".."."""
        if len(self.ends) == 0 or self.ends[0] != 0 or self.ends[-1] != len(self.buffer):
            return False
        lengths = np.diff(self.ends)
        if (lengths < 1).any() or (self.buffer == ord("/")).any() or (self.buffer == 0).any():
            return False
        return not any(self[int(index)] in (".", "..") for index in np.flatnonzero(lengths <= 2))


@dataclass(frozen=True)
class Table:
    """The images of one side, training or validation."""

    classes: list[str]  # their names; a label is a place in this list
    labels: np.ndarray  # int32 (N,), in ascending order
    names: Names  # N names of files, without the class's folder
    sizes: np.ndarray | None  # int64 (N,), bytes of each file; None where they were not asked for
    checks: np.ndarray | None  # uint32 (N,), CRC-32 of each file; None likewise

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        """CLASS/NAME of image `index`."""
        return f"{self.classes[self.labels[index]]}/{self.names[index]}"

    def take(self, indices: np.ndarray) -> Table:
        """Some of the images; `indices` ascend."""
        sizes, checks = (None if column is None else column[indices] for column in (self.sizes, self.checks))
        return Table(self.classes, self.labels[indices], Names.of(map(self.names.__getitem__, indices)), sizes, checks)

    def by_name(self, label: int) -> dict[str, int]:
        """The indices of a class's images by their names."""
        first, last = np.searchsorted(self.labels, (label, label + 1))
        return {self.names[index]: index for index in range(first, last)}

    def verify(self, index: int, data: bytes, name: Callable[[int], str]) -> bytes:
        """`data` itself, if it has the size and the CRC-32 that are known of image `index`; else a FaultError."""
        if self.sizes is not None and len(data) != self.sizes[index]:
            problem = f"has {len(data):,} bytes, {self.sizes[index]:,} when it was indexed"
        elif self.checks is not None and zlib.crc32(data) != self.checks[index]:
            problem = "has other bytes than when it was indexed: its CRC-32 differs"
        else:
            return data
        raise FaultError(name(index), problem, "restore it, or index or pack the data again")


class Files:
    """The files ROOT/CLASS/NAME of a table."""

    resized: int | None = None
    """Files are as they are; a pack's may be smaller."""

    def __init__(self, root: Path, table: Table) -> None:
        self.root, self.table = str(root), table
        self.classes, self.labels = table.classes, table.labels

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.table.where(index))

    def read(self, index: int) -> bytes:
        """The bytes of image `index`; FaultError as of `read_file` and `Table.verify`."""
        return self.table.verify(index, read_file(self.name(index)), self.name)


LARGEST = 2**30
"""Bytes of a file that are read at most."""


def read_file(path: str) -> bytes:
    try:
        # Without O_NONBLOCK, opening a pipe that took the file's place would wait for ever.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise FaultError(path, "is not a regular file", "restore it, or move it elsewhere")
            if status.st_size > LARGEST:
                raise FaultError(path, f"has {status.st_size:,} bytes, too many for an image", "replace or remove it")
            data = os.read(file, status.st_size)
            while len(data) < status.st_size and (more := os.read(file, status.st_size - len(data))):
                data += more
            return data
        finally:
            os.close(file)
    except OSError as error:
        raise FaultError(path, f"cannot be read: {error.strerror}", "restore or remove it") from error


SIDES = ("train", "val")
SUFFIXES = {
    "JPEG": (".jpeg", ".jpg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    "JPEG2000": (".jp2",),
}
"""By the formats that Pillow may try; named, because its others include some that start programs (EPS)."""


def expected(root: Path) -> str:
    """What a folder of images must hold, for messages."""
    return f"expected {root}/train/CLASS/* and {root}/val/CLASS/*"


def list_sides(root: Path, faults: list[FaultError], *, sizes: bool = False, done: Done = ignore) -> dict[str, Table]:
    """The images of ROOT/train/CLASS/* and ROOT/val/CLASS/*, by "train" and "val"; without those that are no folders.

    Names that begin with a dot are passed over, links are followed. Validation classes take the order of the training
    classes, if they are the same but for their Unicode form: é is one letter or two, and systems and archives differ.

    Args:
        faults: everything that is wrong is added to them; what can be used is listed all the same.
    """
    sides: dict[str, Table] = {}
    for side in SIDES:
        if not (root / side).is_dir():
            remedy = f"{expected(root)}, or --validation 0.1 to divide one folder"
            faults.append(FaultError(str(root / side), "is not a folder", remedy))
            continue
        classes = list_classes(root / side, faults)
        if "train" in sides:
            order = {_form(name): number for number, name in enumerate(sides["train"].classes)}
            if {_form(name) for name in classes} == set(order):
                classes.sort(key=lambda name: order[_form(name)])
        sides[side] = list_side(root / side, classes, faults, sizes=sizes, done=done)
    if len(sides) == len(SIDES):
        _compare(root, sides["train"].classes, sides["val"].classes, faults)
    return sides


def list_classes(root: Path, faults: list[FaultError]) -> list[str]:
    """The names of ROOT's folders; what else lies there is a fault, since it is never read."""
    found = _entries(root, faults)
    if found is None:
        return []
    kinds = {entry.name: _kind(entry) for entry in found}
    classes = sorted(name for name, kind in kinds.items() if kind == "a folder")
    if not classes:
        remedy = f"expected one for each class, holding its images: {root}/CLASS/*"
        faults.append(FaultError(str(root), "has no folders", remedy))
    forms: dict[str, str] = {}
    for name in classes:
        if (other := forms.setdefault(_form(name), name)) != name:
            problem = f"looks as {other!a} beside it does, and is spelled {name!a}: both are one name in Unicode"
            faults.append(FaultError(str(root / name), problem, "move the images of one into the other"))
    for name, kind in kinds.items():
        if kind != "a folder":
            problem = f"is {kind} beside the class folders, where nothing is read"
            remedy = "move it into its class's folder, or elsewhere"
            faults.append(FaultError(str(root / name), problem, remedy, note=not image_by_name(name)))
    return classes


def list_class(folder: Path, faults: list[FaultError], *, sizes: bool = False) -> list[tuple[str, int]]:
    """(name, size) of the images in a class's folder, in the order of names; sizes are 0 where nobody asks."""
    found = _entries(folder, faults)
    if found is None:
        return []
    files = []
    for entry in found:
        kind = _kind(entry)
        if kind != "a file":
            problem = f"is {kind}, where images are expected"
            faults.append(FaultError(entry.path, problem, "restore it, or move it elsewhere"))
        elif not image_by_name(entry.name):
            remedy = "move it out of the class's folder"
            faults.append(FaultError(entry.path, "is not named like an image file", remedy))
        else:
            files.append((entry.name, entry.stat().st_size if sizes else 0))
    if not files:
        remedy = "add some, or remove the folder here and in its counterpart"
        faults.append(FaultError(str(folder), "holds no images", remedy))
    return sorted(files)


def refuse(faults: Sequence[FaultError], root: Path | None) -> None:
    """Raise the first of the faults, if any, and say how many more the doctor of `root` lists; notes do not count."""
    wrong = [fault for fault in faults if not fault.note]
    if wrong:
        doctor = f"; `onehour data doctor {root}` lists them" if root is not None else ""
        more = f" ({len(wrong) - 1} more{doctor})" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{shown(more)}")


def list_side(
    root: Path, classes: list[str], faults: list[FaultError], *, sizes: bool = False, done: Done = ignore
) -> Table:
    """The images ROOT/CLASS/* of some classes; arguments as of `list_sides`."""
    counts, found = array("q"), array("q")

    def names() -> Iterator[str]:
        for name in classes:
            files = list_class(root / name, faults, sizes=sizes)
            counts.append(len(files))
            for file, size in files:
                found.append(size)
                yield file
            done(1)

    packed = Names.of(names())
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), np.array(counts, np.int64))
    return Table(classes, labels, packed, np.array(found, np.int64) if sizes else None, None)


def _compare(root: Path, train: list[str], validation: list[str], faults: list[FaultError]) -> None:
    there, here = ({_form(name): name for name in names} for names in (train, validation))
    unknown = sorted(name for form, name in here.items() if form not in there)
    missing = sorted(name for form, name in there.items() if form not in here)
    if train and validation and (unknown or missing):
        problems = [f"has {', '.join(map(repr, unknown))}, which {root}/train has not"] if unknown else []
        problems += [f"lacks {', '.join(map(repr, missing))}"] if missing else []
        remedy = "expected the same class folders in both"
        faults.append(FaultError(f"{root}/val", " and ".join(problems), remedy))


def _entries(folder: Path, faults: list[FaultError]) -> list[os.DirEntry[str]] | None:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        faults.append(FaultError(str(folder), f"cannot be listed: {error.strerror}", "make it readable"))
        return None


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "a folder"
        if entry.is_file():
            return "a file"
        entry.stat()  # is kept by the entry; a link that leads nowhere has none
        return "not a regular file"
    except OSError as error:  # also a circle of links, or one into a folder that may not be read
        return f"a link that cannot be followed ({error.strerror})"


def image_by_name(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    return any(suffix in suffixes for suffixes in SUFFIXES.values())


def _form(name: str) -> str:
    """A name in the form that all its spellings in Unicode have in common."""
    return unicodedata.normalize("NFC", name)

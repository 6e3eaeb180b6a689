"""What lies in a folder of images: ROOT/train/CLASS/* and ROOT/val/CLASS/*, in the order of names."""

from __future__ import annotations

import os
import unicodedata
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from onehour.data.faults import FaultError
from onehour.data.table import Names, Table
from onehour.messages import shown

__all__ = ["SIDES", "list_class", "list_classes", "list_side", "list_sides", "refuse"]

SIDES = ("train", "val")
SUFFIXES = {".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
Report = Callable[[FaultError], None]


def list_sides(
    root: Path, report: Report, *, sizes: bool = False, tick: Callable[[], None] = lambda: None
) -> dict[str, Table]:
    """The images of ROOT/train/CLASS/* and ROOT/val/CLASS/*.

    Names that begin with a dot are passed over, links are followed.

    Args:
        root: the folder.
        report: is told of everything that is wrong; what can be used is listed all the same.
        sizes: ask for each file's size too.
        tick: called after each class.

    Returns:
        By "train" and "val"; without those that are no folders.
    """
    sides: dict[str, Table] = {}
    for side in SIDES:
        if (root / side).is_dir():
            like = sides["train"].classes if "train" in sides else ()
            sides[side] = list_side(root / side, report, like=like, sizes=sizes, tick=tick)
        else:
            expected = f"expected {root}/train/CLASS/* and {root}/val/CLASS/*"
            report(FaultError(str(root / side), "is no folder", expected))
    if len(sides) == len(SIDES):
        _compare(root, sides["train"].classes, sides["val"].classes, report)
    return sides


def list_side(
    root: Path,
    report: Report,
    *,
    like: Sequence[str] = (),
    sizes: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> Table:
    """The images of ROOT/CLASS/*; other arguments as of `list_sides`.

    Args:
        like: names of classes whose order these take, if they are the same but for their Unicode form: é is one letter
            or two, and systems and archives differ in which they write.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "cat").mkdir()
    ...     _ = (Path(folder) / "cat" / "1.jpg").write_bytes(b"")
    ...     list_side(Path(folder), print).where(0)
    'cat/1.jpg'
    """
    classes = list_classes(root, report)
    order = {_form(name): number for number, name in enumerate(like)}
    if {_form(name) for name in classes} == set(order):
        classes.sort(key=lambda name: order[_form(name)])
    counts, found = array("q"), array("q")

    def names() -> Iterator[str]:
        for name in classes:
            files = list_class(root / name, report, sizes=sizes)
            counts.append(len(files))
            for file, size in files:
                found.append(size)
                yield file
            tick()

    packed = Names.of(names())
    labels = np.repeat(np.arange(len(counts), dtype=np.int32), np.array(counts, np.int64))
    return Table(classes, labels, packed, np.array(found, np.int64) if sizes else None, None)


def list_classes(root: Path, report: Report) -> list[str]:
    """The names of ROOT's folders; reports what else lies there, since it is never read."""
    found = _entries(root, report)
    if found is None:
        return []
    kinds = {entry.name: _kind(entry) for entry in found}
    classes = sorted(name for name, kind in kinds.items() if kind == "a folder")
    if not classes:
        remedy = f"expected one for each class, holding its images: {root}/CLASS/*"
        report(FaultError(str(root), "has no folders", remedy))
    forms: dict[str, str] = {}
    for name in classes:
        if (other := forms.setdefault(_form(name), name)) != name:
            problem = f"looks as {other!a} beside it does, and is spelled {name!a}: both are one name in Unicode"
            report(FaultError(str(root / name), problem, "move the images of one into the other"))
    for name, kind in kinds.items():
        if kind != "a folder":
            problem = f"is {kind} beside the class folders, where nothing is read"
            remedy = "move it into its class's folder, or away"
            report(FaultError(str(root / name), problem, remedy, note=not _image_by_name(name)))
    return classes


def list_class(folder: Path, report: Report, *, sizes: bool = False) -> list[tuple[str, int]]:
    """(name, size) of the images in a class's folder, in the order of names; sizes are 0 where nobody asks."""
    found = _entries(folder, report)
    if found is None:
        return []
    files = []
    for entry in found:
        kind = _kind(entry)
        if kind != "a file":
            report(FaultError(entry.path, f"is {kind}, where images are expected", "restore it, or move it away"))
        elif not _image_by_name(entry.name):
            report(FaultError(entry.path, "is no image file by its name", "move it out of the class's folder"))
        else:
            files.append((entry.name, entry.stat().st_size if sizes else 0))
    if not files:
        remedy = "add some, or remove the folder here and in its counterpart"
        report(FaultError(str(folder), "holds no images", remedy))
    return sorted(files)


def refuse(faults: Sequence[FaultError], root: Path) -> None:
    """Raise the first of the faults, if there are any, and say how many more there are; notes do not count.

    Raises:
        ValueError: one line.

    >>> refuse([FaultError("a.jpg", "is odd", "look at it", note=True)], Path("."))
    """
    wrong = [fault for fault in faults if not fault.note]
    if wrong:
        more = f" ({len(wrong) - 1} more; `onehour data doctor {root}` lists them)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}{shown(more)}")


def _compare(root: Path, train: list[str], validation: list[str], report: Report) -> None:
    there, here = ({_form(name): name for name in names} for names in (train, validation))
    unknown = sorted(name for form, name in here.items() if form not in there)
    missing = sorted(name for form, name in there.items() if form not in here)
    if train and validation and (unknown or missing):
        found = [f"has {_quoted(unknown)}, which {root}/train has not"] if unknown else []
        found += [f"lacks {_quoted(missing)}"] if missing else []
        report(FaultError(f"{root}/val", " and ".join(found), "expected the same class folders in both"))


def _entries(folder: Path, report: Report) -> list[os.DirEntry[str]] | None:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        report(FaultError(str(folder), f"cannot be listed: {error.strerror}", "make it readable"))
        return None


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        if entry.is_dir():
            return "a folder"
        if entry.is_file():
            return "a file"
        entry.stat()  # is kept by the entry; a link that leads nowhere has none
        return "no plain file"
    except OSError as error:  # also a circle of links, or one into a folder that may not be read
        return f"a link that cannot be followed ({error.strerror})"


def _image_by_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


def _form(name: str) -> str:
    """A name in the form that all its spellings in Unicode have in common."""
    return unicodedata.normalize("NFC", name)


def _quoted(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)

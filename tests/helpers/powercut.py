"""What may be on disk when the power goes: file operations as they were done, and the trees that they may have left."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

Operation = tuple[Any, ...]


@dataclass(eq=False)
class File:
    """Its content, and as much of it as is on disk for certain."""

    content: bytes = b""
    synced: bytes = b""


@dataclass(eq=False)
class Folder:
    """Its entries after each change since the last fsync, the first of which is on disk for certain."""

    states: list[dict[str, File | Folder]] = field(default_factory=lambda: [{}])

    @property
    def now(self) -> dict[str, File | Folder]:
        return self.states[-1]

    def change(self, **names: File | Folder | None) -> None:
        """Entries that come, or go."""
        new = {name: node for name, node in (self.now | names).items() if node is not None}
        self.states.append(new)


class Log:
    """Every operation below a folder, in order, as far as `os` does it; contents at the latest at an fsync."""

    def __init__(self, root: Path) -> None:
        self.root = os.path.realpath(root)
        self.operations: list[Operation] = []
        self._handles: dict[int, int] = {}
        self._turn = threading.RLock()

    def mark(self, what: Any) -> None:
        """Something that is promised from here on."""
        with self._turn:
            self.operations.append(("mark", what))

    @contextmanager
    def active(self) -> Iterator[Log]:
        notes = {
            **{name: getattr(self, f"_{name}") for name in ("open", "close", "dup", "mkdir", "rename", "replace")},
            **{name: getattr(self, f"_{name}") for name in ("write", "pwrite", "ftruncate", "fsync")},
            **dict.fromkeys(("unlink", "remove", "rmdir"), self._gone),
        }
        with ExitStack() as stack:
            for name, note in notes.items():
                stack.enter_context(mock.patch.object(os, name, self._around(getattr(os, name), note)))
            yield self

    def _around(self, real: Callable[..., Any], note: Callable[..., None]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            with self._turn:
                # Names are resolved before they change.
                places = [
                    self._below(name, options.get("dir_fd", options.get(f"{side}_dir_fd")))
                    for name, side in zip(arguments, ("src", "dst"), strict=False)
                    if isinstance(name, str | os.PathLike)
                ]
                before = bool(places and places[0] is not None and os.path.lexists(places[0]))
                returned = real(*arguments, **options)
                note(places, arguments, returned, before)
                return returned

        return operation

    def _below(self, name: Any, folder: int | None) -> str | None:
        if isinstance(name, int):
            return None
        path = os.fspath(name)
        base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
        head, tail = os.path.split(os.path.join(base, path))
        place = os.path.join(os.path.realpath(head), tail)
        return place if place.startswith(f"{self.root}/") or place == self.root else None

    def _open(self, places: list[str | None], arguments: Any, file: int, before: bool) -> None:
        self._handles.pop(file, None)
        place = os.path.realpath(f"/proc/self/fd/{file}")
        if place.startswith(f"{self.root}/") or place == self.root:
            self._handles[file] = len(self.operations)
            kind = "open" if before or not arguments[1] & os.O_CREAT else "create"
            flags = arguments[1] & (os.O_APPEND | os.O_TRUNC)
            self.operations.append((kind, os.path.relpath(place, self.root), flags))

    def _close(self, places: Any, arguments: Any, returned: None, before: bool) -> None:
        self._handles.pop(arguments[0], None)

    def _dup(self, places: Any, arguments: Any, file: int, before: bool) -> None:
        self._handles.pop(file, None)
        if arguments[0] in self._handles:
            self._handles[file] = self._handles[arguments[0]]

    def _write(self, places: Any, arguments: Any, count: int, before: bool) -> None:
        self._do("write", arguments[0], bytes(arguments[1])[:count], None)

    def _pwrite(self, places: Any, arguments: Any, count: int, before: bool) -> None:
        self._do("write", arguments[0], bytes(arguments[1])[:count], arguments[2])

    def _ftruncate(self, places: Any, arguments: Any, returned: None, before: bool) -> None:
        self._do("truncate", arguments[0], arguments[1])

    def _fsync(self, places: Any, arguments: Any, returned: None, before: bool) -> None:
        link = Path(f"/proc/self/fd/{arguments[0]}")
        if link.is_file():  # what was written by other functions
            self._do("content", arguments[0], link.read_bytes())
        self._do("fsync", arguments[0])

    def _do(self, kind: str, file: int, *about: Any) -> None:
        if file in self._handles:
            self.operations.append((kind, self._handles[file], *about))

    def _mkdir(self, places: list[str | None], arguments: Any, returned: None, before: bool) -> None:
        if places[0]:
            self.operations.append(("mkdir", os.path.relpath(places[0], self.root)))

    def _rename(self, places: list[str | None], arguments: Any, returned: None, before: bool) -> None:
        if places[0] and places[1]:
            self.operations.append(("rename", *(os.path.relpath(place, self.root) for place in places if place)))

    _replace = _rename

    def _gone(self, places: list[str | None], arguments: Any, returned: None, before: bool) -> None:
        if places[0]:
            self.operations.append(("gone", os.path.relpath(places[0], self.root)))


class Disk:
    """A disk after some operations.

    >>> disk = Disk([("create", "a", 0), ("write", 0, b"abc", None), ("fsync", 0)])
    >>> disk.certain()
    {}
    >>> disk.all()
    {'a': b'abc'}
    """

    def __init__(self, operations: list[Operation]) -> None:
        self.root = Folder()
        self.marks: list[Any] = []
        self._handles: dict[int, tuple[File | Folder, int]] = {}
        self._ends: dict[int, int] = {}
        for number, (kind, *about) in enumerate(operations):
            getattr(self, f"_{kind}")(number, *about)

    def certain(self) -> dict[str, bytes | None]:
        """What is there for certain, and nothing else: paths with contents, None for folders."""
        return dict(self._tree(self.root, lambda folder: folder.states[0], lambda file: file.synced))

    def all(self) -> dict[str, bytes | None]:
        """As if nothing were lost."""
        return dict(self._tree(self.root, lambda folder: folder.now, lambda file: file.content))

    def some(self, draw: random.Random) -> dict[str, bytes | None]:
        """Each folder's entries up to some change, and of each file what is certain, all, or its beginning."""

        def content(file: File) -> bytes:
            sure = len(file.synced) if file.content.startswith(file.synced) else 0
            return draw.choice([file.synced, file.content[: draw.randint(sure, len(file.content))]])

        return dict(self._tree(self.root, lambda folder: draw.choice(folder.states), content))

    def _tree(self, folder: Folder, entries: Any, content: Any, above: str = "") -> Iterator[tuple[str, bytes | None]]:
        for name, node in sorted(entries(folder).items()):
            if isinstance(node, Folder):
                yield f"{above}{name}", None
                yield from self._tree(node, entries, content, f"{above}{name}/")
            else:
                yield f"{above}{name}", content(node)

    def _at(self, path: str) -> File | Folder:
        node: File | Folder = self.root
        for part in () if path == "." else path.split("/"):
            assert isinstance(node, Folder)
            node = node.now[part]
        return node

    def _place(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.rpartition("/")
        folder = self._at(above or ".")
        assert isinstance(folder, Folder)
        return folder, name

    def _mark(self, number: int, what: Any) -> None:
        self.marks.append(what)

    def _open(self, number: int, path: str, flags: int) -> None:
        node = self._at(path)
        self._handles[number] = node, flags
        self._ends[number] = 0
        if flags & os.O_TRUNC and isinstance(node, File):
            node.content = b""

    def _create(self, number: int, path: str, flags: int) -> None:
        folder, name = self._place(path)
        folder.change(**{name: File()})
        self._open(number, path, flags)

    def _write(self, number: int, handle: int, content: bytes, at: int | None) -> None:
        node, flags = self._handles[handle]
        assert isinstance(node, File)
        begin = at if at is not None else len(node.content) if flags & os.O_APPEND else self._ends[handle]
        node.content = node.content[:begin].ljust(begin, b"\0") + content + node.content[begin + len(content) :]
        if at is None:
            self._ends[handle] = begin + len(content)

    def _truncate(self, number: int, handle: int, size: int) -> None:
        node, _ = self._handles[handle]
        assert isinstance(node, File)
        node.content = node.content[:size].ljust(size, b"\0")

    def _content(self, number: int, handle: int, content: bytes) -> None:
        node, _ = self._handles[handle]
        assert isinstance(node, File)
        node.content = content

    def _fsync(self, number: int, handle: int) -> None:
        node, _ = self._handles[handle]
        if isinstance(node, File):
            node.synced = node.content
        else:
            node.states = node.states[-1:]

    def _mkdir(self, number: int, path: str) -> None:
        folder, name = self._place(path)
        folder.change(**{name: Folder()})

    def _gone(self, number: int, path: str) -> None:
        folder, name = self._place(path)
        folder.change(**{name: None})

    def _rename(self, number: int, old: str, new: str) -> None:
        node, (source, before), (target, after) = self._at(old), self._place(old), self._place(new)
        if source is target:
            source.change(**{before: None, after: node})
        else:
            target.change(**{after: node})
            source.change(**{before: None})


def laid_out(tree: dict[str, bytes | None], root: Path) -> None:
    """Make what was left."""
    for path, content in tree.items():
        if content is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(content)

"""A script that writes, removes and renames only in an overlay; its files stay untouched.

What goes past Python's own functions is not seen: other programs that the script starts, and libraries that open files
in C (sqlite, HDF5). torch's and safetensors' are.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from onehour.check.observe.recorder import Patches
from onehour.check.run.overlay import Overlay

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Isolation:
    """Stands before the functions that touch files.

    Args:
        overlay: says where a path is read and written instead.
    """

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay

    def install(self, patches: Patches) -> None:
        """Put all in place."""
        actions: list[tuple[Any, str, Callable[..., Any]]] = [
            *((os, name, self._read) for name in ("stat", "lstat", "access", "chdir", "readlink", "statvfs")),
            *((os, name, self._read) for name in ("listxattr", "getxattr")),
            *((os, name, self._change) for name in ("utime", "chmod", "truncate", "setxattr")),
            *((os, name, self._remove) for name in ("remove", "unlink", "rmdir")),
            *((os, name, self._rename) for name in ("rename", "replace")),
            *((os, name, self._link) for name in ("link", "symlink")),
            *((owner, "open", self._open) for owner in (builtins, io)),
            (os, "open", self._os_open),
            (os, "mkdir", self._mkdir),
            (os, "listdir", self._listdir),
            (os, "scandir", self._scandir),
            (shutil, "rmtree", self._rmtree),
        ]
        folders = {"symlink": ("", "dir_fd")} | dict.fromkeys(
            ("link", "rename", "replace"), ("src_dir_fd", "dst_dir_fd")
        )
        for owner, name, action in actions:
            if hasattr(owner, name):
                patches.around(owner, name, self._by_name(action, folders.get(name, ("dir_fd",))))
        savers = [(torch, "save", "load"), (torch.jit, "save", "load")]
        if "safetensors.torch" in sys.modules:
            savers.append((sys.modules["safetensors.torch"], "save_file", "load_file"))
        for owner, save, load in savers:
            patches.around(owner, save, self._save)
            patches.around(owner, load, self._read)

    def _by_name(self, action: Callable[..., Any], folders: tuple[str, ...]) -> Callable[..., Any]:
        """An action on whole paths: what is given by an open folder is named by where that folder lies.

        Args:
            action: called with the original function and its arguments.
            folders: the options that hold the folders of the first arguments.
        """

        def named(original: Any, *arguments: Any, **options: Any) -> Any:
            pairs = zip(arguments, folders, strict=False)
            paths = [self.overlay.named(path, options.pop(name, None)) for path, name in pairs]
            return action(original, *paths, *arguments[len(paths) :], **options)

        return named

    def _open(self, original: Any, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if self.overlay.upper(file) is None:
            return original(file, mode, *arguments, **options)
        if not set(mode) & set("wax+"):
            return original(self.overlay.read(file), mode, *arguments, **options)
        if "x" in mode:
            _refuse(file, os.path.exists(file))
        return original(self.overlay.write(file, keep="w" not in mode), mode, *arguments, **options)

    def _os_open(self, original: Any, path: Any, flags: int, *arguments: Any, **options: Any) -> Any:
        if self.overlay.upper(path) is None:
            return original(path, flags, *arguments, **options)
        if not flags & _WRITING:
            return original(self.overlay.read(path), flags, *arguments, **options)
        if flags & os.O_EXCL:
            _refuse(path, os.path.exists(path))
        return original(self.overlay.write(path, keep=not flags & os.O_TRUNC), flags, *arguments, **options)

    def _read(self, original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        return original(self.overlay.read(path), *arguments, **options)

    def _change(self, original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        """Of a file its copy; a folder stays as it is."""
        if self.overlay.upper(path) is None:
            return original(path, *arguments, **options)
        if os.path.isdir(path):
            return None
        return original(self.overlay.write(path, keep=True), *arguments, **options)

    def _link(self, original: Any, source: Any, target: Any, *arguments: Any, **options: Any) -> Any:
        _refuse(target, os.path.lexists(target))
        source = self.overlay.read(source) if original.__name__ == "link" else source
        return original(source, self.overlay.write(target, keep=False), *arguments, **options)

    def _save(self, original: Any, *arguments: Any, **options: Any) -> Any:
        """The path is the second argument, or has one of two names."""
        given = list(arguments)
        given[1:2] = [self.overlay.write(path, keep=False) for path in given[1:2]]
        named = {name: self.overlay.write(options[name], keep=False) for name in ("f", "filename") if name in options}
        return original(*given, **(options | named))

    def _remove(self, original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if self.overlay.upper(path) is None:
            return original(path, *arguments, **options)
        if original.__name__ == "rmdir" and os.listdir(path):
            raise OSError(39, "Directory not empty", os.fspath(path))
        return self.overlay.remove(path)

    def _rename(self, original: Any, source: Any, target: Any, **options: Any) -> Any:
        if self.overlay.upper(source) is None and self.overlay.upper(target) is None:
            return original(source, target, **options)
        reading = self.overlay.read(source)
        if not os.path.exists(reading):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(source))
        if not self.overlay.below(source):
            return original(reading, self.overlay.write(target, keep=False), **options)
        if os.path.isdir(reading):
            shutil.copytree(source, target, dirs_exist_ok=True)
            return shutil.rmtree(source)
        shutil.copyfile(reading, self.overlay.write(target, keep=False))
        return os.remove(source)

    def _mkdir(self, original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if self.overlay.upper(path) is None:
            return original(path, *arguments, **options)
        _refuse(path, os.path.exists(path))
        return original(self.overlay.write(path, keep=False), *arguments, **options)

    def _listdir(self, original: Any, path: Any = ".") -> list[str]:
        names = self.overlay.names(path)
        return original(self.overlay.read(path)) if names is None else names

    def _scandir(self, original: Any, path: Any = ".") -> Any:
        names = self.overlay.names(path)
        if names is None:
            return original(self.overlay.read(path))
        return _Entries(original, self.overlay, os.fspath(path), names)

    def _rmtree(self, original: Any, path: Any, ignore_errors: bool = False, *arguments: Any, **options: Any) -> None:
        if self.overlay.upper(path) is None:
            return original(path, ignore_errors, *arguments, **options)
        if os.path.exists(path):
            return self.overlay.remove(path)
        if not ignore_errors:
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return None


def _refuse(path: Any, exists: bool) -> None:
    if exists:
        raise FileExistsError(17, "File exists", os.fspath(path))


class _Entries:
    """What `scandir` gives, of a folder whose parts lie in two places."""

    def __init__(self, original: Any, overlay: Overlay, path: str, names: list[str]) -> None:
        self._entries: list[_Entry] = []
        for name in names:
            place = overlay.read(os.path.join(path, name))
            with original(os.path.dirname(place)) as entries:
                self._entries += [_Entry(entry, path) for entry in entries if entry.name == name]

    def __iter__(self) -> _Entries:
        return self

    def __next__(self) -> _Entry:
        if not self._entries:
            raise StopIteration
        return self._entries.pop(0)

    def __enter__(self) -> _Entries:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """As a scandir's; nothing is open."""


class _Entry:
    """A directory entry under the path that the script knows."""

    def __init__(self, entry: os.DirEntry[str], path: str) -> None:
        self._entry, self.name, self.path = entry, entry.name, os.path.join(path, entry.name)

    def __fspath__(self) -> str:
        return self.path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)

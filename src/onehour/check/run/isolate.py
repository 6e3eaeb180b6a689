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
from typing import Any

import torch

from onehour.check.observe.recorder import Patches
from onehour.check.run.overlay import Overlay

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def isolate(overlay: Overlay, patches: Patches) -> None:
    """Stand before the functions that touch files."""

    def around(owner: Any, name: str, function: Any, *folders: str) -> None:
        if hasattr(owner, name):
            patches.around(owner, name, _by_name(overlay, function, folders or ("dir_fd",)))

    for owner in (builtins, io):
        around(owner, "open", _opening(overlay))
    around(os, "open", _os_open(overlay))
    for name in ("stat", "lstat", "access", "chdir", "readlink", "statvfs", "listxattr", "getxattr"):
        around(os, name, _reading(overlay))
    for name in ("utime", "chmod", "truncate", "setxattr"):
        around(os, name, _changing(overlay))
    around(os, "symlink", _linking(overlay), "", "dir_fd")
    around(os, "link", _linking(overlay), "src_dir_fd", "dst_dir_fd")
    for name in ("remove", "unlink", "rmdir"):
        around(os, name, _removing(overlay))
    for name in ("rename", "replace"):
        around(os, name, _renaming(overlay), "src_dir_fd", "dst_dir_fd")
    around(os, "mkdir", _making(overlay))
    around(os, "listdir", _listing(overlay))
    around(os, "scandir", _scanning(overlay))
    around(shutil, "rmtree", _clearing(overlay))
    patches.around(torch, "save", _saving(overlay, 1))
    patches.around(torch, "load", _reading(overlay))
    patches.around(torch.jit, "save", _saving(overlay, 1))
    patches.around(torch.jit, "load", _reading(overlay))
    safetensors = sys.modules.get("safetensors.torch")
    if safetensors is not None:
        patches.around(safetensors, "save_file", _saving(overlay, 1))
        patches.around(safetensors, "load_file", _reading(overlay))


def _by_name(overlay: Overlay, function: Any, folders: tuple[str, ...]) -> Any:
    """As a function of whole paths: what is given by an open folder is named by where that folder lies.

    Args:
        folders: the options that hold the folders of the first arguments.
    """

    def named(original: Any, *arguments: Any, **options: Any) -> Any:
        paths = [overlay.named(path, options.pop(name, None)) for path, name in zip(arguments, folders, strict=False)]
        return function(original, *paths, *arguments[len(paths) :], **options)

    return named


def _opening(overlay: Overlay) -> Any:
    def opening(original: Any, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if overlay.upper(file) is None:
            return original(file, mode, *arguments, **options)
        if not set(mode) & set("wax+"):
            return original(overlay.read(file), mode, *arguments, **options)
        if "x" in mode and os.path.exists(file):
            raise FileExistsError(17, "File exists", os.fspath(file))
        return original(overlay.write(file, keep="w" not in mode), mode, *arguments, **options)

    return opening


def _os_open(overlay: Overlay) -> Any:
    def opening(original: Any, path: Any, flags: int, *arguments: Any, **options: Any) -> Any:
        if options.get("dir_fd") is not None or overlay.upper(path) is None:
            return original(path, flags, *arguments, **options)
        if not flags & _WRITING:
            return original(overlay.read(path), flags, *arguments, **options)
        if flags & os.O_EXCL and os.path.exists(path):
            raise FileExistsError(17, "File exists", os.fspath(path))
        return original(overlay.write(path, keep=not flags & os.O_TRUNC), flags, *arguments, **options)

    return opening


def _reading(overlay: Overlay) -> Any:
    def reading(original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("dir_fd") is not None:
            return original(path, *arguments, **options)
        return original(overlay.read(path), *arguments, **options)

    return reading


def _changing(overlay: Overlay) -> Any:
    """Of a file its copy; a folder stays as it is."""

    def changing(original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("dir_fd") is not None or overlay.upper(path) is None:
            return original(path, *arguments, **options)
        if os.path.isdir(path):
            return None
        return original(overlay.write(path, keep=True), *arguments, **options)

    return changing


def _linking(overlay: Overlay) -> Any:
    def linking(original: Any, source: Any, target: Any, *arguments: Any, **options: Any) -> Any:
        if any(name.endswith("dir_fd") and value is not None for name, value in options.items()):
            return original(source, target, *arguments, **options)
        if os.path.lexists(target):
            raise FileExistsError(17, "File exists", os.fspath(target))
        source = overlay.read(source) if original.__name__ == "link" else source
        return original(source, overlay.write(target, keep=False), *arguments, **options)

    return linking


def _saving(overlay: Overlay, position: int) -> Any:
    names = ("f", "filename")

    def saving(original: Any, *arguments: Any, **options: Any) -> Any:
        given = list(arguments)
        if len(given) > position:
            given[position] = overlay.write(given[position], keep=False)
        options |= {name: overlay.write(options[name], keep=False) for name in names if name in options}
        return original(*given, **options)

    return saving


def _removing(overlay: Overlay) -> Any:
    def removing(original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("dir_fd") is not None or overlay.upper(path) is None:
            return original(path, *arguments, **options)
        if original.__name__ == "rmdir" and os.listdir(path):
            raise OSError(39, "Directory not empty", os.fspath(path))
        return overlay.remove(path)

    return removing


def _renaming(overlay: Overlay) -> Any:
    def renaming(original: Any, source: Any, target: Any, **options: Any) -> Any:
        if overlay.upper(source) is None and overlay.upper(target) is None:
            return original(source, target, **options)
        reading = overlay.read(source)
        if not os.path.exists(reading):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(source))
        if not overlay.below(source):
            return original(reading, overlay.write(target, keep=False), **options)
        if os.path.isdir(reading):
            shutil.copytree(source, target, dirs_exist_ok=True)
            return shutil.rmtree(source)
        shutil.copyfile(reading, overlay.write(target, keep=False))
        return os.remove(source)

    return renaming


def _making(overlay: Overlay) -> Any:
    def making(original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("dir_fd") is not None or overlay.upper(path) is None:
            return original(path, *arguments, **options)
        if os.path.exists(path):
            raise FileExistsError(17, "File exists", os.fspath(path))
        return original(overlay.write(path, keep=False), *arguments, **options)

    return making


def _listing(overlay: Overlay) -> Any:
    def listing(original: Any, path: Any = ".") -> list[str]:
        names = overlay.names(path)
        return original(overlay.read(path)) if names is None else names

    return listing


def _scanning(overlay: Overlay) -> Any:
    def scanning(original: Any, path: Any = ".") -> Any:
        names = overlay.names(path)
        return original(overlay.read(path)) if names is None else _Entries(original, overlay, os.fspath(path), names)

    return scanning


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


def _clearing(overlay: Overlay) -> Any:
    def clearing(original: Any, path: Any, ignore_errors: bool = False, *arguments: Any, **options: Any) -> None:
        if overlay.upper(path) is None:
            return original(path, ignore_errors, *arguments, **options)
        if os.path.exists(path):
            return overlay.remove(path)
        if not ignore_errors:
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return None

    return clearing

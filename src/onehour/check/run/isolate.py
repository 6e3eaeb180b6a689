"""A script that changes nothing outside: it writes and removes in an overlay, and services that it reports to are off.

What goes past Python's own functions is not seen: other programs that the script starts, and libraries that open files
in C (sqlite, HDF5). torch's and safetensors' are.
"""

from __future__ import annotations

import builtins
import errno
import importlib.util
import io
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from onehour.check.observe.recorder import Patches
from onehour.check.run.overlay import Overlay

_AS_THEY_ARE = ("onehour.", "posix", "nt", "_io", "importlib", "_frozen_importlib", "torch._C")
"""Modules that have the functions as they were: our own, those that define them, and what imports modules."""
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@cache
def names_of_functions() -> dict[int, list[tuple[ModuleType, str]]]:
    """By what names the loaded modules have each function that touches files, by its id.

    To look for them takes as long as a small script, and is done once, before processes are forked.
    """
    known = {id(value) for owner in (os, builtins, shutil) for value in vars(owner).values() if callable(value)}
    found: defaultdict[int, list[tuple[ModuleType, str]]] = defaultdict(list)
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith(_AS_THEY_ARE):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in known:
                    found[id(value)].append((module, name))
    return found


class Isolation:
    """Stands before the functions that touch files, also where other modules have their own names for them."""

    def __init__(self, overlay: Overlay) -> None:
        self.overlay = overlay

    def install(self, patches: Patches) -> None:
        actions: list[tuple[Any, str, Callable[..., Any]]] = [
            *((os, name, self._read) for name in ("stat", "access", "statvfs", "pathconf", "listxattr", "getxattr")),
            *((os, name, partial(self._read, follow=False)) for name in ("lstat", "readlink")),
            *((os, name, self._change) for name in ("utime", "chmod", "chown", "truncate", "setxattr", "removexattr")),
            *((os, name, self._change) for name in ("lchown", "lchmod", "chflags")),
            *((os, name, self._remove) for name in ("remove", "unlink", "rmdir")),
            *((os, name, self._rename) for name in ("rename", "replace")),
            *((os, name, self._link) for name in ("link", "symlink")),
            *((os, name, self._make) for name in ("mkdir", "mkfifo", "mknod")),
            (builtins, "open", self._open),
            (os, "open", self._os_open),
            (os, "chdir", self._chdir),
            (os, "getcwd", self._getcwd),
            (os, "getcwdb", lambda original: os.fsencode(os.getcwd())),
            *((os, name, self._list) for name in ("listdir", "scandir")),
            (shutil, "rmtree", self._rmtree),
        ]
        folders = {"symlink": ("", "dir_fd")} | dict.fromkeys(
            ("link", "rename", "replace"), ("src_dir_fd", "dst_dir_fd")
        )
        for owner, name, action in actions:
            if original := getattr(owner, name, None):
                patches.around(owner, name, self._by_name(action, folders.get(name, ("dir_fd",))))
                for module, other in names_of_functions()[id(original)]:
                    if (module, other) != (owner, name):
                        patches.put(module, other, getattr(owner, name))
                for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
                    if original in able:
                        able.add(getattr(owner, name))
        savers = [(torch, "save", "load"), (torch.jit, "save", "load")]
        if "safetensors.torch" in sys.modules:
            savers.append((sys.modules["safetensors.torch"], "save_file", "load_file"))
        for owner, save, load in savers:
            patches.around(owner, save, self._save)
            patches.around(owner, load, self._read)
        patches.put(io, "FileIO", self._file_io(io.FileIO))

    def _by_name(self, action: Callable[..., Any], folders: tuple[str, ...]) -> Callable[..., Any]:
        """An action on whole paths: what is given by an open folder is named by where that folder lies.

        `folders` are the options that hold the open folders of the first arguments.
        """
        numbered = {"listdir", "scandir", "chdir", "chmod", "chown", "utime", "truncate"}

        def named(original: Any, *arguments: Any, **options: Any) -> Any:
            for name in ("path", "src", "dst", "file"):  # as keywords, in this order
                if name in options:
                    arguments += (options.pop(name),)
            paths = []
            for path, name in zip(arguments, folders, strict=False):
                if isinstance(path, int) and original.__name__ in numbered:
                    known = self.overlay.of_descriptor(path)
                    paths.append(path if self.overlay.upper(known) is None else known)
                else:
                    paths.append(self.overlay.named(path, options.pop(name, None)))
            arguments = (*paths, *arguments[len(paths) :])
            if len(paths) == 1 and paths[0] is not None and self.overlay.upper(paths[0]) is None:
                return original(*arguments, **options)
            return action(original, *arguments, **options)

        return named

    def _file_io(self, original: type[io.FileIO]) -> type[io.FileIO]:
        isolation = self

        class FileIO(original):
            """Opened where the script's files are kept."""

            def __init__(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> None:
                isolation._open(super().__init__, file, mode, *arguments, **options)

        return FileIO

    def _open(self, original: Any, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wax+"):
            return original(self.overlay.read(file), mode, *arguments, **options)
        if "x" in mode:
            _refuse(file, os.path.exists(file))
        return original(self.overlay.write(file, keep="w" not in mode), mode, *arguments, **options)

    def _os_open(self, original: Any, path: Any, flags: int, *arguments: Any, **options: Any) -> Any:
        if not flags & _WRITING:
            return original(self.overlay.read(path), flags, *arguments, **options)
        if flags & os.O_EXCL:
            _refuse(path, os.path.exists(path))
        return original(self.overlay.write(path, keep=not flags & os.O_TRUNC), flags, *arguments, **options)

    def _chdir(self, original: Any, path: Any) -> None:
        """To the folder that was there before, if it was: what is written below it is found by its whole name."""
        return original(path if self.overlay.below(path) else self.overlay.read(path))

    def _getcwd(self, original: Any) -> str:
        path = original()
        return (path.removeprefix(self.overlay.root) or os.sep) if path.startswith(self.overlay.root) else path

    def _read(self, original: Any, path: Any, *arguments: Any, follow: bool = True, **options: Any) -> Any:
        return original(self.overlay.read(path, follow=follow), *arguments, **options)

    def _change(self, original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        """Of a file its copy; a folder stays as it is."""
        if os.path.isdir(path):
            return None
        return original(self.overlay.write(path, keep=True), *arguments, **options)

    def _link(self, original: Any, source: Any, target: Any, *arguments: Any, **options: Any) -> Any:
        _refuse(target, os.path.lexists(target))
        if original.__name__ == "symlink":
            self.overlay.linked = True
        else:  # the script may write through one name or the other
            source = self.overlay.write(source, keep=True)
        return original(source, self.overlay.write(target, keep=False, follow=False), *arguments, **options)

    def _save(self, original: Any, *arguments: Any, **options: Any) -> Any:
        """The path is the second argument, or has one of two names."""
        given = list(arguments)
        given[1:2] = [self.overlay.write(path, keep=False) for path in given[1:2]]
        named = {name: self.overlay.write(options[name], keep=False) for name in ("f", "filename") if name in options}
        return original(*given, **(options | named))

    def _remove(self, original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        if original.__name__ == "rmdir" and os.listdir(path):
            raise OSError(39, "Directory not empty", os.fspath(path))
        return self.overlay.remove(path)

    def _rename(self, original: Any, source: Any, target: Any, **options: Any) -> Any:
        upper, reading = self.overlay.upper(source), self.overlay.read(source, follow=False)
        if upper is not None and not os.path.lexists(reading):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(source))
        if upper is None or not self.overlay.below(source):
            try:
                return original(reading, self.overlay.write(target, keep=False, follow=False), **options)
            except OSError as error:
                if error.errno != errno.EXDEV:  # as two folders say that overlayfs keeps
                    raise
        if os.path.isdir(reading) and not os.path.islink(source):
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
            return shutil.rmtree(source)
        shutil.copyfile(reading, self.overlay.write(target, keep=False))
        return os.remove(source)

    def _make(self, original: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        _refuse(path, os.path.lexists(path))
        return original(self.overlay.write(path, keep=False), *arguments, **options)

    def _list(self, original: Any, path: Any = ".") -> Any:
        path = "." if path is None else path
        names = self.overlay.names(path)
        if names is None:
            place = self.overlay.read(path)
            return original(os.fsencode(place) if isinstance(path, bytes) else place)  # names are of the same kind
        if original.__name__ == "scandir":
            return _Entries(original, self.overlay, os.fspath(path), names)
        return [os.fsencode(name) for name in names] if isinstance(path, bytes) else names

    def _rmtree(self, original: Any, path: Any, ignore_errors: bool = False, *arguments: Any, **options: Any) -> None:
        if os.path.exists(path):
            return self.overlay.remove(path)
        if not ignore_errors:
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return None


def _refuse(path: Any, exists: bool) -> None:
    if exists:
        raise FileExistsError(17, "File exists", os.fspath(path))


class _Entries(ExitStack):
    """What `scandir` gives, of a folder whose parts lie in two places; nothing is open."""

    def __init__(self, original: Any, overlay: Overlay, path: str | bytes, names: list[str]) -> None:
        super().__init__()
        self._entries: list[_Entry] = []
        for name in names:
            place = overlay.read(os.path.join(os.fsdecode(path), name), follow=False)
            with original(os.path.dirname(place)) as entries:
                self._entries += [_Entry(entry, path) for entry in entries if entry.name == name]

    def __iter__(self) -> _Entries:
        return self

    def __next__(self) -> _Entry:
        if not self._entries:
            raise StopIteration
        return self._entries.pop(0)


class _Entry:
    """A directory entry under the path that the script knows."""

    def __init__(self, entry: os.DirEntry[str], path: str | bytes) -> None:
        self._entry = entry
        self.name = os.fsencode(entry.name) if isinstance(path, bytes) else entry.name
        self.path: Any = os.path.join(path, self.name)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def __fspath__(self) -> Any:
        return self.path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)


def switch_off(folder: Path) -> None:
    """In this process and those that it starts; the folder takes what MLflow writes."""
    store = folder.as_uri()
    os.environ.update(
        WANDB_MODE="disabled",
        MLFLOW_TRACKING_URI=store,
        MLFLOW_REGISTRY_URI=store,
        MLFLOW_ALLOW_FILE_STORE="true",
    )
    sys.meta_path.insert(0, _Changing({"wandb": _change_wandb, "mlflow": _change_mlflow}))


def _change_wandb(wandb: ModuleType) -> None:
    """Whatever mode the script asks for, and without a key."""
    begin = wandb.init
    vars(wandb)["init"] = lambda *arguments, **options: begin(*arguments, **(options | {"mode": "disabled"}))
    vars(wandb)["login"] = lambda *arguments, **options: True


def _change_mlflow(mlflow: ModuleType) -> None:
    vars(mlflow).update(set_tracking_uri=lambda *_, **__: None, set_registry_uri=lambda *_, **__: None)


class _Changing:
    """Changes modules, by their names, when they are imported."""

    def __init__(self, changes: dict[str, Callable[[ModuleType], None]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """What the other finders of `sys.meta_path` find, for a module to change."""
        change = self.changes.pop(name, None)
        spec = importlib.util.find_spec(name) if change is not None else None
        if change is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        vars(spec.loader)["exec_module"] = execute_and_change
        return spec

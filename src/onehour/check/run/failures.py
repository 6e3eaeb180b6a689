"""What is said of an error that a script ended with, in a line: where, what, and what it often means."""

from __future__ import annotations

import linecache
import platform
import re
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version
from types import FrameType, ModuleType
from typing import Any

import torch
from torch import nn

from onehour.check.observe.source import is_users

_GPU = re.compile(r"cuda|cudnn|nccl|nvidia|\bgpus?\b", re.IGNORECASE)
_NOBODY_TYPES = " (nobody types at the terminal of a script that is checked)"
_NO_GPU = " (this machine has no GPU; let the script choose its device, or check it where there is one)"
_OLD = re.compile(
    r"Weights only load failed|Legacy autograd function|invalid index of a 0-dim tensor"
    r"|Subtraction, the `-` operator, with a bool tensor"
)
_NO_NAME = re.compile(r"(?:module|from|named) '([\w.]+)'")
_NO_KEYWORD = re.compile(r"([\w.]+)\(\) got an unexpected keyword argument")


def in_a_line(error: BaseException) -> str:
    """An error's kind and text, the source of an assertion, and what to do about a GPU or a release that is missing."""
    text = str(error).strip()
    source = _assertion(error)
    said = text.splitlines()[0] if text else source or "without a message"
    line = f"{type(error).__name__}: {said}"[:400]
    if text and source:
        line += f" ({source})"
    if isinstance(error, EOFError):
        return line + _NOBODY_TYPES
    return line + (gpu_hint(text, error) or _release_hint(error, text))


def gpu_hint(text: str, error: BaseException | None = None) -> str:
    """What to do where an error is about a GPU, and there is none; else nothing."""
    if torch.cuda.is_available() or isinstance(error, OSError):
        return ""
    inside = any("/torch/cuda/" in frame.filename for frame in _frames(error))
    return _NO_GPU if inside or _GPU.search(text) else ""


def place(error: BaseException) -> str | None:
    """The user's line that an error came from."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [frame for frame in _frames(error) if is_users(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _frames(error: BaseException | None) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__)) if error is not None else []


def _assertion(error: BaseException) -> str | None:
    """The source of an assertion that failed, where it can be read."""
    frames = _frames(error)
    if not isinstance(error, AssertionError) or not frames or not (frames[-1].line or "").startswith("assert"):
        return None
    return " ".join((frames[-1].line or "").split())


def _release_hint(error: BaseException, text: str) -> str:
    """Whose installed release has not what the script wants; nothing where an error means something else."""
    if isinstance(error, SyntaxError):
        old = "Missing parentheses in call to" in text or re.search(r"\basync\s*=", error.text or "")
        package = "sys" if old else None
    elif isinstance(error, AttributeError | ImportError):
        package = _lacking(error, text)
    elif isinstance(error, TypeError) and (match := _NO_KEYWORD.match(text)):
        package = _home(match[1].split(".")[0], error)
    else:
        package = "torch" if _OLD.search(text) else None
    if package is None:
        return ""
    name = "Python" if package in sys.stdlib_module_names else package
    return f" (the script seems too old for the installed {name} {_release(package)})"


def _release(package: str) -> str:
    if package in sys.stdlib_module_names:
        return platform.python_version()
    try:
        return version(package)
    except PackageNotFoundError:
        return getattr(sys.modules[package], "__version__", "")


def _lacking(error: AttributeError | ImportError, text: str) -> str | None:
    """The package of which a module has no such name, or an object no such attribute."""
    match = _NO_NAME.search(text)
    name = match[1] if match else None
    if isinstance(error, AttributeError) and not isinstance(error.obj, ModuleType | None):
        kind = error.obj if isinstance(error.obj, type) else type(error.obj)
        name = None if issubclass(kind, nn.Module) else kind.__module__
    if isinstance(error, ModuleNotFoundError) and "." not in (name or ""):
        return None  # not installed
    return _installed(name)


def _installed(module: str | None) -> str | None:
    """The package of a module that is loaded and not the user's own."""
    package = (module or "").split(".")[0]
    loaded = sys.modules.get(package)
    if loaded is None or package in ("__main__", "builtins") or is_users(getattr(loaded, "__file__", None) or "<>"):
        return None
    return package


def _home(name: str, error: BaseException) -> str | None:
    """The package of what the user's failing line calls by a name, or by that of a module in front of it."""
    frame: FrameType | None = None
    line = ""
    for found, number in traceback.walk_tb(error.__traceback__):
        if is_users(found.f_code.co_filename):
            frame, line = found, linecache.getline(found.f_code.co_filename, number)
    match = re.search(rf"((?:\w+\.)*)\b{re.escape(name)}\b", line)
    if frame is None or match is None:
        return None
    known: dict[str, Any] = frame.f_globals | frame.f_locals
    value: Any = None
    for part in [*match[1].split(".")[:-1], name]:
        value = known.get(part)
        known = vars(value) if isinstance(value, ModuleType) else {}
    return _installed(getattr(value, "__module__", None))

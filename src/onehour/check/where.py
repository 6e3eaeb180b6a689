"""Which line of the user's own code is at work: the innermost one outside the libraries."""

from __future__ import annotations

import os
import sys
import sysconfig
from functools import lru_cache
from types import FrameType

import torch

__all__ = ["Own", "called_directly", "maker_line", "user_frames", "user_line"]


class Own:
    """What counts as the user's code although it lies among the libraries: a script of a package, say.

    >>> Own.folders
    set()
    """

    folders: set[str] = set()  # noqa: RUF012


_LIBRARIES = tuple(
    {
        os.path.join(os.path.realpath(path), "")
        for name, path in sysconfig.get_paths().items()
        if name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
    }
    | {os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "")}
)
_NEAR = tuple(
    os.path.join(os.path.dirname(see(path)), "")
    for path in (os.path.dirname(__file__), torch.__file__)
    for see in (os.path.abspath, os.path.realpath)
)
"""Ours and torch's."""
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


@lru_cache(maxsize=4096)
def is_users(filename: str) -> bool:
    """Whether a file is the user's: neither of the standard library, nor of an installed package, nor ours.

    >>> is_users(os.__file__), is_users("<string>")
    (False, False)
    """
    if filename.startswith("<"):
        return False
    real = os.path.realpath(filename)
    if os.path.dirname(real) in Own.folders:
        return True
    return not real.startswith(_LIBRARIES) and not any(part in real for part in _PACKAGES)


_absolute = lru_cache(maxsize=4096)(os.path.abspath)  # as it was before a script changed the folder


def user_frames(depth: int = 1) -> list[FrameType]:
    """The user's frames on the stack, the innermost first.

    Args:
        depth: callers to leave out.

    >>> user_frames()
    []
    """
    frames = []
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            frames.append(frame)
        frame = frame.f_back
    return frames


def maker_line(made: object, depth: int = 1) -> str | None:
    """file:line of the innermost frame of the user's that makes an object, and is no method of the object itself.

    Args:
        made: is under construction.
        depth: callers to leave out.

    >>> maker_line(object()) is None
    True
    """
    for frame in user_frames(depth + 1):
        if frame.f_code.co_name != "__init__" or frame.f_locals.get("self") is not made:
            return f"{_absolute(frame.f_code.co_filename)}:{frame.f_lineno}"
    return None


def called_directly(depth: int = 1) -> bool:
    """Whether it is the user's own code that called one of torch's functions: nobody's stands between.

    Args:
        depth: callers to leave out.

    >>> called_directly()
    False
    """
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None and frame.f_code.co_filename.startswith(_NEAR):
        frame = frame.f_back
    return frame is not None and is_users(frame.f_code.co_filename)


def user_line(depth: int = 1) -> str | None:
    """file:line of the innermost frame that is the user's; None where there is none.

    Args:
        depth: callers to leave out.

    >>> user_line() is None
    True
    """
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{_absolute(frame.f_code.co_filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return None

"""What people are shown: one line that any terminal can print, whose printing never ends a run."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from typing import TextIO

NOBODYS = ("argparse.py", "<frozen runpy>", "onehour/entry.py")
"""Files that say nothing of whose code an error comes from."""
SCARCE = re.compile("can't start new thread|Resource temporarily unavailable|failed to map segment|Cannot allocate")
"""What Python, OpenMP and the loader of libraries say where threads, processes or memory run out."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Names to offer instead of `word`: the nearest, else all."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return close[0] if close else f"one of {', '.join(known)}"


def shown(text: str) -> str:
    r"""A text that any terminal can print on one line: control characters and lone bytes of names are escaped.

    >>> shown("a\nb")
    'a\\nb'
    """
    printable = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in printable)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print; a full disk, or a reader that is gone, makes no failure of a run."""
    with suppress(OSError):
        print(text, file=stream, flush=True)


def tell(text: object) -> None:
    """Say on standard error what went wrong, or what a person should know of a run."""
    say(f"onehour: {text}", sys.stderr)


def escape_output() -> None:
    """From now on a letter that standard output cannot encode, as γ where LANG is C, is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def encodable(text: str, encoding: str | None) -> str:
    r"""A text with escapes in place of what an encoding lacks; for output that is not ours to change.

    >>> encodable("γ = 0", "ascii")
    '\\u03b3 = 0'
    """
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def stderr_muted() -> Generator[None]:
    """While entered, nothing reaches the process's standard error, also of what libraries in C write there."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def let_go() -> None:
    """What could not be written would be tried again when the interpreter ends, and change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except (AttributeError, ValueError):  # there is none, or it is closed
            pass


def blame(error: BaseException) -> str:
    """An error of someone's code in one line: its type, its text and the line it comes from.

    >>> try: 1 / 0
    ... except ZeroDivisionError as error: blame(error).split(" (")[0]
    'ZeroDivisionError: division by zero'
    """
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if not frame.filename.endswith(NOBODYS) and "importlib" not in frame.filename]
    where = f" ({outside[-1].filename}:{outside[-1].lineno})" if outside else ""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}{where}"


def in_one_message(command: Callable[[], int]) -> int:
    """Run a command, whose code it returns; a ValueError says where it leaves Python or the machine lacks memory."""
    try:
        return command()
    except SystemExit as error:
        said = blame(error)
        if f"{os.sep}rich{os.sep}" in said:  # how it leaves when nobody reads any more
            raise BrokenPipeError from error
        raise ValueError(f"code that was called exits Python: {said}; it should raise an error instead") from error
    except MemoryError as error:
        raise ValueError("memory ran out; use fewer processes, --loaders or --jobs, or smaller images") from error
    except (ImportError, RuntimeError) as error:
        if not SCARCE.search(str(error)):
            raise
        said = str(error).splitlines()[0]
        if isinstance(error, ImportError):
            raise ValueError(f"memory ran out while Python imported: {said}") from error
        raise ValueError(
            f"this machine allows no more threads or processes ({said}); use fewer --processes, --loaders or --jobs, or"
            " raise `ulimit -u`"
        ) from error

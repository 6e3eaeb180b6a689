"""What is printed never ends a run: not where its output cannot show a letter, is full, or is read by nobody."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["encodable", "let_go", "printable", "shown"]


def printable() -> None:
    """From now on a letter that standard output cannot encode, as γ where LANG is C, is printed as an escape.

    >>> printable()
    """
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


def let_go() -> None:
    """What could not be written would be tried again when the interpreter ends, and change the exit code.

    >>> let_go()
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except (AttributeError, ValueError):  # there is none, or it is closed
            pass


def shown(text: str) -> str:
    r"""A text that any terminal can print on one line: control characters and lone bytes of names are escaped.

    >>> shown("a\nb")
    'a\\nb'
    """
    printable = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in printable)

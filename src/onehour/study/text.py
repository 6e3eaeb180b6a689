"""Numbers and names as a report writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

__all__ = ["error_text", "joined", "number", "p_text", "points", "printable", "seconds_text", "short", "size_label"]


def size_label(minibatch: float) -> str:
    """A minibatch as the paper writes it, k for 1024.

    >>> size_label(512), size_label(8192), size_label(1536), size_label(1000)
    ('512', '8k', '1.5k', '1000')
    """
    size = round(minibatch)
    return f"{size / 1024:g}k" if size >= 1024 and size % 512 == 0 else str(size)


def number(value: float, digits: int = 2) -> str:
    """A number with a real minus sign; a dash for none.

    >>> number(-0.126), number(3.6), number(float("nan"))
    ('−0.13', '3.60', '–')
    """
    return f"{value:.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def points(value: float) -> str:
    """A difference with its sign.

    >>> points(0.4), points(-0.4), points(-0.001), points(float("nan"))
    ('+0.40', '−0.40', '0.00', '–')
    """
    return f"{value:+z.2f}".replace("+0.00", "0.00").replace("-", "−") if math.isfinite(value) else "–"


def p_text(p: float) -> str:
    """A p-value.

    >>> p_text(0.0241), p_text(5e-6)
    ('p = 0.024', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def error_text(mean: float, std: float) -> str:
    """An entry as the paper's tables write it.

    >>> error_text(23.6, 0.12), error_text(23.6, float("nan"))
    ('23.60 ± 0.12', '23.60')
    """
    return f"{number(mean)} ± {number(std)}" if math.isfinite(std) else number(mean)


def seconds_text(seconds: float) -> str:
    """A time that people can read.

    >>> seconds_text(12.34), seconds_text(600), seconds_text(7200)
    ('12.3 s', '10.0 min', '2.0 h')
    """
    if not math.isfinite(seconds):
        return "–"
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.3g} s"


def joined(words: Sequence[str]) -> str:
    """A list in a sentence.

    >>> joined(["a"]), joined(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def printable(text: str) -> str:
    r"""A text whose characters every terminal, file and page can hold: others are written as JSON and TOML write them.

    >>> printable("a\x9b1m\nγ")
    'a\\u009b1m\nγ'
    """
    return "".join(c if c.isprintable() or c in "\n\u00a0" else json.dumps(c)[1:-1] for c in text)


def short(text: str, most: int = 48) -> str:
    """Outside text on one line: printable, and not too long.

    >>> short("a\\nb\\x00" + 60 * "c", most=8)
    'a b ccc…'
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else line[: most - 1] + "…"

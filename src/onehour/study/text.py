"""Numbers and names as a report writes them, and what the paper measured for the same change (T1, T2a, T2b)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from fractions import Fraction

from onehour.config import Recipe
from onehour.study.paper import paper_table
from onehour.study.results import Arm

__all__ = [
    "GROUPS",
    "OTHERS",
    "error_text",
    "group_of",
    "joined",
    "number",
    "p_text",
    "paper_cost",
    "plain_name",
    "points",
    "printable",
    "seconds_text",
    "short",
    "size_label",
]


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


OTHERS = ("arm", "curve")
"""Names under which an arm is somebody else's text: a CSV's column, or its file."""

GROUPS = {
    "rate": "Warmup and rate",
    "pitfall": "One thing wrong",
    "n": "BatchNorm’s n",
    "other": "Other changes",
}
"""Questions that arms answer, each corrected for its own number of arms."""

PLAIN = {
    "warmup=none": "no warmup",
    "warmup=constant": "constant warmup",
    "warmup=gradual": "gradual warmup",
    "scaling=fixed": "the rate not scaled",
    "scaling=sqrt": "the rate scaled by √k",
    "scaling=linear": "the rate scaled by k",
    "zero_gamma=false": "no zero γ",
    "zero_gamma=true": "zero γ",
    "pitfall=gradient-sum-not-mean": "loss divided by n, not kn",
    "pitfall=decay-on-batchnorm": "weight decay on BatchNorm",
    "pitfall=momentum-inside-uncorrected": "rate inside the momentum, not corrected",
    "pitfall=overlapping-shards": "each worker shuffles for itself",
    "pitfall=batchnorm-stats-of-rank-0": "running statistics of process 0 alone",
    "pitfall=batchnorm-stats-k-times": "running statistics moved k times",
    "pitfall=warmup-per-epoch": "warmup in steps of an epoch",
}


def plain_name(arm: Arm, recipe: Recipe | None = None, minibatch: int | None = None) -> str:
    """What an arm changes, in words.

    Args:
        recipe: the base, to say a rate as a multiple of its own.
        minibatch: kn at which it was run, to say BatchNorm's n as a share of it.

    >>> plain_name((("warmup", "none"),)), plain_name((("base_lr", "0.05"),), Recipe())
    ('no warmup', 'half the rate')
    >>> plain_name((("per_worker", "8192"),), Recipe(), 8192)
    'BatchNorm over all of kn'
    """
    return ", ".join(_plain(name, value, recipe, minibatch) for name, value in arm) or "the recipe"


def group_of(arm: Arm, minibatch: int | None) -> str:
    """Which of `GROUPS` an arm belongs to.

    >>> group_of((("per_worker", "8"),), 512), group_of((("per_worker", "512"),), 512)
    ('n', 'pitfall')
    """
    kinds = {_kind(name, value, minibatch) for name, value in arm}
    return kinds.pop() if len(kinds) == 1 else "other"


def paper_cost(arm: Arm, recipe: Recipe | None) -> float | None:
    """What the change costs in the paper, in points, at a minibatch of 8k; None where it is not in its tables.

    >>> round(paper_cost((("warmup", "none"),), Recipe()), 2), paper_cost((("momentum", "0.8"),), Recipe())
    (1.1, None)
    """
    if recipe is None or len(arm) != 1:
        return None
    ((name, value),) = arm
    own = {"warmup": "gradual", "scaling": "linear", "zero_gamma": True}
    if name in own and getattr(recipe, name) != own[name]:
        return None
    label = f"{name}={value}"
    if name == "base_lr":
        label = f"base_lr={0.1 * float(value) / recipe.base_lr:.12g}"
    tables = {
        "warmup=gradual": paper_table("T1"),
        "base_lr=0.1": paper_table("T2a"),
        "zero_gamma=true": paper_table("T2b"),
    }
    for reference, table in tables.items():
        errors = {entry.label: entry.mean for entry in table if entry.minibatch == 8192}
        if label in errors and label != reference:
            return errors[label] - errors[reference]
    return None


def _kind(name: str, value: str, minibatch: int | None) -> str:
    if name == "per_worker":
        return "pitfall" if value == str(minibatch) else "n"
    return {
        **dict.fromkeys(("warmup", "warmup_epochs", "scaling", "base_lr", "milestones", "decay"), "rate"),
        **dict.fromkeys(("pitfall", "zero_gamma"), "pitfall"),
    }.get(name, "other")


def _plain(name: str, value: str, recipe: Recipe | None, minibatch: int | None) -> str:
    if name in OTHERS:
        return value
    if name == "per_worker":
        return "BatchNorm over all of kn" if value == str(minibatch) else f"n = {value}"
    if name == "base_lr" and recipe is not None:
        factor = Fraction(value) / Fraction(str(recipe.base_lr))
        words = {Fraction(1, 2): "half the rate", Fraction(2): "twice the rate"}
        return words.get(factor, f"{float(factor):.3g} times the rate")
    return PLAIN.get(f"{name}={value}", f"{name} = {value}")

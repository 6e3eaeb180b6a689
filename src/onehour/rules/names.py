"""Parameters chosen by their names, as a recipe says them and as a model has them.

A pattern is a name of `named_parameters`, in which * and ? stand for any letters (`fnmatch`).
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onehour.rules.arguments import positive


def patterns(name: str, given: Any) -> tuple[str, ...]:
    """A list of patterns; one text would be a pattern for each letter.

    >>> patterns("freeze", ["stem.*"])
    ('stem.*',)
    """
    listed: list[Any] = [*given] if isinstance(given, Iterable) and not isinstance(given, str) else [None]
    if not all(isinstance(pattern, str) and pattern for pattern in listed):
        raise ValueError(f"{name} must be a list of parameters' names or patterns such as stem.*, got {given!r}")
    return tuple(listed)


def layer_rates(given: Any) -> tuple[str, ...]:
    """PATTERN=FACTOR in the patterns' order, of such texts or of a table.

    >>> layer_rates({"stem.*": 0.1, "head.*": 10})
    ('head.*=10.0', 'stem.*=0.1')
    """
    if isinstance(given, Mapping):
        table: Mapping[Any, Any] = given
        given = [f"{pattern}={factor}" for pattern, factor in table.items()]
    factors: dict[str, float] = {}
    for text in patterns("layer_rates", given):
        pattern, _, factor = text.rpartition("=")
        try:
            found = positive("factor", float(factor))
        except ValueError:
            found = None
        if not pattern or found is None:
            raise ValueError(f"layer_rates has {text!r}; expected a name and a factor above zero, such as stem.*=0.1")
        if pattern in factors:
            raise ValueError(f"layer_rates has {pattern} twice")
        factors[pattern] = found
    return tuple(f"{pattern}={factors[pattern]}" for pattern in sorted(factors))


def match_names(patterns: Sequence[str], names: Sequence[str], *, what: str, of: str) -> dict[str, list[str]]:
    """The names that each pattern stands for.

    >>> match_names(["stem.*"], ["stem.weight", "head.weight"], what="freeze", of="parameter")
    {'stem.*': ['stem.weight']}
    """
    found = {pattern: fnmatch.filter(names, pattern) for pattern in patterns}
    for pattern, matched in found.items():
        if not matched:
            ends = [(name, end) for name in names for end, letter in enumerate(name) if letter == "."]
            known = [*dict.fromkeys(f"{name[:end]}.*" for name, end in ends), *names]
            near = ", ".join(difflib.get_close_matches(pattern, known, cutoff=0.0))
            raise ValueError(f"{what} {pattern!r} matches no {of}; near it are {near}")
    return found

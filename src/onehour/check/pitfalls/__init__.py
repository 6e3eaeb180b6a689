"""The paper's pitfalls, a family a file: what was recorded of a run -> a finding, or None without evidence."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from onehour.check.finding import Pitfall
from onehour.check.pitfalls import (
    batchnorm,
    decay,
    evaluation,
    gradient,
    momentum,
    processes,
    rate,
    samples,
    schedule,
)

FAMILIES = (rate, schedule, momentum, gradient, decay, samples, evaluation, processes, batchnorm)

PITFALLS: dict[str, Pitfall] = {
    one.id: one
    for family in FAMILIES
    for one in vars(family).values()
    if isinstance(one, Pitfall) and one.judge.__module__ == family.__name__
}
"""Every pitfall by its id, in the order in which they are judged."""


def refuse_unknown(pitfalls: Collection[str]) -> None:
    """Refuse an id that is none, and name the nearest.

    >>> refuse_unknown(["double-step"])
    """
    for name in pitfalls:
        if name not in PITFALLS:
            near = difflib.get_close_matches(name, PITFALLS, n=1, cutoff=0.0)[0]
            raise ValueError(f"no pitfall is called {name!r}; expected {near!r} or another of docs/checks")

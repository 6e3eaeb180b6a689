"""The losses that several batches share, and the weights of their samples: mixup's, auxiliary ones, distillation."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from onehour.check.story import MicroBatch
from onehour.check.tape import LossTerm


def losses(gathered: list[MicroBatch]) -> list[list[LossTerm]]:
    """Each loss that all batches have: its terms, one of each batch. What the forward pass computes first comes first.

    Losses of one function whose weights vary from batch to batch are one more together: mixup divides a batch's weight.
    """
    keyed = [_keyed(micro) for micro in gathered]
    found: list[list[LossTerm]] = []
    for name in dict.fromkeys(name for terms in keyed for name, *_ in terms):
        own = [[term for term in terms.values() if term.name == name] for terms in keyed]
        shared = [key for key in keyed[0] if key[0] == name and all(key in terms for terms in keyed)]
        apart = [[terms[key] for terms in keyed] for key in shared]
        steady = all(alike([term.total for term in loss]) for loss in apart)
        found += apart
        parts = not steady or any(len(each) != len(shared) for each in own)
        if parts and all(len({(term.count, term.reduction) for term in each}) == 1 for each in own):
            found.append([_together(each) for each in own])
    return found


def _keyed(micro: MicroBatch) -> dict[tuple[str, str | None, int], LossTerm]:
    """A batch's losses by function, line, and which of the line's it is; hooks see the last one first."""
    lines: Counter[tuple[str, str | None]] = Counter()
    keyed: dict[tuple[str, str | None, int], LossTerm] = {}
    for term in reversed(micro.terms):
        line = term.name, term.where
        keyed[*line, lines[line]] = term
        lines[line] += 1
    return keyed


def _together(terms: list[LossTerm]) -> LossTerm:
    total, low, high = (math.fsum(numbers) for numbers in zip(*[(t.total, t.low, t.high) for t in terms], strict=True))
    return replace(terms[0], total=total, low=low, high=high)


def is_mean(loss: list[LossTerm]) -> bool:
    """Whether its weights are 1 if nothing is multiplied: a distillation's batchmean has a temperature in it."""
    return all(term.reduction == "mean" for term in loss)


def alike(numbers: list[float], tolerance: float = 1e-3) -> bool:
    """Whether numbers are one number.

    >>> alike([1.0, 1.0005]), alike([1.0, 1.01])
    (True, False)
    """
    return max(numbers) - min(numbers) <= tolerance * max(map(abs, numbers))


def first_of(shares: tuple[float, ...], weights: list[list[float]], tolerance: float = 1e-3) -> float | None:
    """Which of the shares a mean loss's weights are; of several losses the first that is one: an auxiliary has any."""
    said = (share for each in weights for share in shares if all(abs(w / share - 1) < tolerance for w in each))
    return next(said, None)

"""Adam at κ times the minibatch: the square-root rule (Malladi 2022) and decoupled decay (Wang & Aitchison 2024)."""

from __future__ import annotations

import math
from typing import TypedDict

from onehour.rules.arguments import fraction, not_negative, positive, positive_int
from onehour.rules.minibatch import Minibatch

__all__ = ["adam_scaling"]

ROUNDING = 1e-9


class AdamOptions(TypedDict):
    """Keyword arguments of torch's Adam and AdamW."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def adam_scaling(
    *,
    base_minibatch: int,
    minibatch: int | Minibatch,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
) -> AdamOptions:
    """What Adam takes at κ = kn / base times its minibatch, from what is right at the base.

    η' = η·√κ, 1 − β' = κ·(1 − β) for both, ε' = ε/√κ (Malladi et al. 2022, arXiv:2205.10287): where the gradient's
    noise is larger than the gradient, its second moment falls as 1/κ, and both averages go on to span as many samples
    as before. A decoupled decay shrinks weights by η·λ an update, of which there are κ times fewer an epoch: λ' = λ·√κ
    keeps what an epoch shrinks (Wang & Aitchison 2024, arXiv:2405.13698). A coupled one is part of the loss and stays.

    Args:
        base_minibatch: images an update of the base recipe.
        minibatch: kn, images an update now.
        lr, betas, eps, weight_decay: as they are right at the base.
        decoupled: whether the decay is AdamW's; Adam's own is coupled.

    Raises:
        ValueError: where κ·(1 − β) ≥ 1, so that an average would have nothing left; with the limit for κ.

    >>> scaled = adam_scaling(base_minibatch=256, minibatch=1024, lr=1e-3, weight_decay=0.05)
    >>> {name: scaled[name] for name in ("lr", "eps", "weight_decay")}
    {'lr': 0.002, 'eps': 5e-09, 'weight_decay': 0.1}
    >>> [round(beta, 6) for beta in scaled["betas"]]
    [0.6, 0.996]
    """
    size = minibatch.size if isinstance(minibatch, Minibatch) else positive_int("minibatch", minibatch)
    times = size / positive_int("base_minibatch", base_minibatch)
    first, second = (
        scaled_beta(f"beta{number}", fraction(f"beta{number}", beta, upper=1), times)
        for number, beta in enumerate(betas, 1)
    )
    root = math.sqrt(times)
    return {
        "lr": positive("lr", lr) * root,
        "betas": (first, second),
        "eps": not_negative("eps", eps) / root,
        "weight_decay": not_negative("weight_decay", weight_decay) * (root if decoupled else 1),
    }


def scaled_beta(name: str, beta: float, times: float) -> float:
    """1 − κ·(1 − β); no average, β = 0, stays none."""
    if beta and times * (1 - beta) > 1 - ROUNDING:
        raise ValueError(
            f"at {times:g} times the minibatch {name} {beta:g} becomes 1 − {times:g} · {1 - beta:.4g} ="
            f" {1 - times * (1 - beta):.4g}, which averages nothing; it works below {1 / (1 - beta):.4g} times, or with"
            f" a {name} above {1 - 1 / times:.6g} at the base, or keep both (a recipe's scale_betas = false)"
        )
    return 1 - times * (1 - beta) if beta else 0.0

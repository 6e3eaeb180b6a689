"""How large a minibatch is, and the rate that belongs to it (paper §2.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from onehour.rules.arguments import fraction, positive, positive_int

__all__ = ["Minibatch", "fixed_scaling", "linear_scaling", "sqrt_scaling"]


@dataclass(frozen=True)
class Minibatch:
    """The minibatch of one update: k workers of n images each, kn in all (§2.1, §2.3).

    n is part of the loss, because BatchNorm normalises over it; k is not. So scale k and keep n.

    Args:
        per_worker: n, images a worker sees at once.
        workers: k, the number of workers. Processes are only where they run.

    Raises:
        ValueError: if either is not a positive integer.

    >>> minibatch = Minibatch(per_worker=32, workers=256)
    >>> minibatch.size
    8192
    >>> minibatch.iterations(samples=1_281_167, epochs=90)
    14076
    """

    per_worker: int
    workers: int

    def __post_init__(self) -> None:
        for name in ("per_worker", "workers"):
            object.__setattr__(self, name, positive_int(name, getattr(self, name)))

    @classmethod
    def of(cls, size: int, per_worker: int) -> Minibatch:
        """The minibatch of kn = `size` images with n = `per_worker`: k follows.

        >>> Minibatch.of(8192, per_worker=32).workers
        256
        """
        size, per_worker = positive_int("minibatch", size), positive_int("per_worker", per_worker)
        return cls(per_worker, whole_workers("minibatch", size, per_worker=per_worker))

    @property
    def size(self) -> int:
        """kn, images an update."""
        return self.per_worker * self.workers

    def iterations_per_epoch(self, samples: int) -> float:
        """N / kn, updates in one pass over N = `samples` images; a minibatch may straddle two epochs."""
        return positive_int("samples", samples) / self.size

    def iterations(self, samples: int, epochs: float) -> int:
        """⌈E·N / kn⌉, updates of a whole run of E = `epochs`; E·N is rounded to a whole image.

        >>> Minibatch(per_worker=32, workers=8).iterations(samples=1000, epochs=3)
        12
        """
        images = round(Fraction(positive("epochs", epochs)) * positive_int("samples", samples))
        return max(1, -(-images // self.size))


def linear_scaling(base_lr: float, base_minibatch: int, minibatch: int | Minibatch) -> float:
    """The linear scaling rule: when the minibatch is multiplied by k, multiply the rate by k (§2.1).

    η̂ = η · kn / base. Everything else (momentum, weight decay, epochs, milestones) stays.

    Args:
        base_lr: η, the rate that is right for `base_minibatch`.
        base_minibatch: images an update of the base recipe.
        minibatch: kn, images an update now.

    >>> linear_scaling(0.1, 256, 8192)
    3.2
    """
    return positive("base_lr", base_lr) * size_of(minibatch) / positive_int("base_minibatch", base_minibatch)


def sqrt_scaling(base_lr: float, base_minibatch: int, minibatch: int | Minibatch) -> float:
    """η̂ = η · √(kn / base): the rule that the paper rejects (T2a: 26.22 % against 23.74 % at 8k).

    >>> sqrt_scaling(0.1, 256, 1024)
    0.2
    """
    return positive("base_lr", base_lr) * math.sqrt(
        Fraction(size_of(minibatch), positive_int("base_minibatch", base_minibatch))
    )


def fixed_scaling(base_lr: float, base_minibatch: int, minibatch: int | Minibatch) -> float:
    """η̂ = η whatever the minibatch: the other rule that fails (T2a: 41.67 % at 8k).

    >>> fixed_scaling(0.1, 256, 8192)
    0.1
    """
    size_of(minibatch)
    positive_int("base_minibatch", base_minibatch)
    return positive("base_lr", base_lr)


def ema_scaling(decay: float, base_minibatch: int, minibatch: int | Minibatch) -> float:
    """ρ' = ρ^κ, κ = kn / base: an average of the weights spans as many images as before (Busbridge et al. 2023).

    κ updates that leave the weights as they are move it by as much as one does at κ times the minibatch
    (arXiv:2307.13813).

    >>> ema_scaling(0.5, 256, 512)
    0.25
    """
    times = Fraction(size_of(minibatch), positive_int("base_minibatch", base_minibatch))
    return float(fraction("decay", decay, upper=1) ** times)


def parse_size(text: str | int) -> int:
    """A number of images as people write it; the suffix k is 1024, as in the paper.

    >>> parse_size("8k"), parse_size("256")
    (8192, 256)
    """
    written = str(text).strip().lower()
    digits, unit = (written[:-1], 1024) if written.endswith("k") else (written, 1)
    if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
        raise ValueError(f"{text!r} is not a size; expected a positive whole number such as 256 or 8k (k = 1024)")
    return int(digits) * unit


def size_of(minibatch: int | Minibatch) -> int:
    """kn, in whichever way it was given."""
    return minibatch.size if isinstance(minibatch, Minibatch) else positive_int("minibatch", minibatch)


def whole_workers(name: str, images: int, *, per_worker: int, samples: int | None = None) -> int:
    """How many workers of n see `images` together.

    Args:
        samples: N, where no more than these may be taken.

    >>> whole_workers("minibatch", 8192, per_worker=32)
    256
    """
    if samples is not None and images > samples:
        raise ValueError(f"{name} is {images} images, and the data has {samples}; use at most these")
    if images % per_worker:
        lower = max(images // per_worker, 1) * per_worker
        raise ValueError(
            f"{name} {images} is not a multiple of per_worker {per_worker}, so it is not a whole number of"
            f" workers; use {lower} or {lower + per_worker}, or another per_worker"
        )
    return images // per_worker

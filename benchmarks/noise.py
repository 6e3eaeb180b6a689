"""What the gradient noise is claimed to be: an interval that covers, and under 2 % of a run.

    python benchmarks/noise.py

1,000 problems of known Σ and G, half of them of samples with heavy tails; and the processor's time that runs of digits
spend on it, between their iterations. Writes results/noise.json (three minutes).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import onehour
from onehour.data.loader import Batch
from onehour.noise import noise_scale, trace_and_square
from onehour.training.measure import MINIBATCHES, GradientNoise
from results import write

PROBLEMS, SEED = 1000, 17
SEEDS, EPOCHS = 2, 6


def problem(rng: np.random.Generator) -> tuple[list[tuple[float, float]], float]:
    """The points of a run whose gradients' mean and covariance are known, and its B.

    Σ has a spectrum i^−a, 0 ≤ a ≤ 1.5, in 32 to 512 dimensions; |G|² and tr Σ differ from point to point; B is 1 to 64
    times the minibatch, at 8 to 60 points.
    """
    points, dimensions = int(rng.integers(8, 60)), int(2 ** rng.uniform(5, 9))
    minibatch, spread = 32, rng.uniform(0, 0.8)
    scale = minibatch * 2 ** rng.uniform(0, 6)
    spectrum = np.arange(1, dimensions + 1) ** -rng.uniform(0, 1.5)
    squares = np.exp(spread * rng.standard_normal(points) - spread**2 / 2)
    traces = scale * np.exp(0.3 * spread * rng.standard_normal(points) - (0.3 * spread) ** 2 / 2)
    directions = rng.standard_normal((points, dimensions))
    directions *= (np.sqrt(squares) / np.linalg.norm(directions, axis=1))[:, None]
    shape = (points, MINIBATCHES, dimensions)
    heavy = rng.random() < 0.5  # Student's t with 4 degrees of freedom, of variance 2
    drawn = rng.standard_t(4, shape) / np.sqrt(2) if heavy else rng.standard_normal(shape)
    noise = drawn * np.sqrt(spectrum / spectrum.sum() / minibatch) * np.sqrt(traces)[:, None, None]
    gradients = directions[:, None] + noise
    small, big = (gradients**2).sum(-1).mean(1), (gradients.mean(1) ** 2).sum(-1)
    sizes = {"small_size": minibatch, "big_size": MINIBATCHES * minibatch}
    found = [trace_and_square(float(s), float(b), **sizes) for s, b in zip(small, big, strict=True)]
    return found, float(scale)


def coverage(problems: int = PROBLEMS, seed: int = SEED) -> dict[str, Any]:
    """In how many problems the interval has B, and in how many of those where B is estimable."""
    rng = np.random.default_rng(seed)
    covered = estimable = both = 0
    for _ in range(problems):
        points, scale = problem(rng)
        found = noise_scale(points)
        inside = (found.low is None or found.low <= scale) and (found.high is None or scale <= found.high)
        covered += inside
        estimable += found.scale is not None
        both += found.scale is not None and inside
    return {"problems": problems, "seed": seed, "covered": covered, "estimable": estimable, "covered_of_these": both}


def cost() -> dict[str, Any]:
    """The processor's seconds of measuring over those of the rest of the training, and whether the bits are equal."""
    shares, equal, measure = [], True, GradientNoise.measure
    spent: list[float] = []

    def timed(self: GradientNoise, iteration: int, batches: Iterator[Batch]) -> list[Batch]:
        began = time.process_time()
        taken = measure(self, iteration, batches)
        spent.append(time.process_time() - began)
        return taken

    GradientNoise.measure = timed
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(SEEDS):
            spent.clear()
            run, plain = (
                onehour.train("digits", epochs=EPOCHS, seed=seed, out=Path(folder, f"{seed}-{noise}"), noise=noise)
                for noise in (True, False)
            )
            seconds = sum(line["cpu_seconds"] for line in run.timing)
            shares.append(sum(spent) / (seconds - sum(spent)))
            equal &= run.summary["state_sha256"] == plain.summary["state_sha256"]
    return {"epochs": EPOCHS, "shares": shares, "mean": float(np.mean(shares)), "equal_bits": equal}


if __name__ == "__main__":
    write(__file__, "noise", {"coverage": coverage(), "cost": cost()})
    sys.exit(0)

"""What an iteration costs on p processes: the slowest one's computation, then what backward hides not of the reduction.

Of the fast reduction, whose bytes and messages are those of a ring: each process sends and receives 2·(p − 1)/p of the
vector, in 2·(p − 1) steps that each wait for the one before (paper §4; halving and doubling sends as much in fewer).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

BUCKET_BYTES = 25 * 2**20
"""The size at which a bucket of the reduction closes."""
BACKWARD = 2 / 3
"""Of forward and backward."""
REACH, STEP = 10.0, 0.01
"""Standard deviations that an integral goes over, and its steps."""


@dataclass(frozen=True)
class Measured:
    """What a run says of its iterations, in seconds."""

    processes: int  # p of the run
    image: float  # data, forward and backward of an image on one process
    fixed: float  # the update, and whatever else an iteration spends once
    reduction: float  # waiting for it
    spread: float  # σ of a process's time from one iteration to the next, as a share of it
    gradient_bytes: int  # of the vector that is summed
    pass_images: int  # in a process's forward and backward pass, at most


@dataclass(frozen=True)
class Links:
    """What joins the processes."""

    bandwidth: float  # bits a second of each process's link, each way
    latency: float  # seconds from one process to the next


@dataclass(frozen=True)
class IterationTime:
    """Seconds of an iteration."""

    compute: float  # data, forward and backward of a process with the most workers, on average
    slowest: float  # how many times as long the slowest process takes
    reduction: float  # that is not hidden behind backward
    fixed: float  # the update, and whatever else is spent once

    @property
    def seconds(self) -> float:
        return self.compute * self.slowest + self.reduction + self.fixed


def expected_iteration(
    measured: Measured, *, images: int, processes: int, links: Links | None, spread: float
) -> IterationTime:
    """An iteration on p processes: measured where the run had as many, modelled otherwise.

    Args:
        images: of the process with the most workers.
        links: needed for several processes that are not as many as the run's.
    """
    compute = images * measured.image
    if processes == measured.processes:
        return IterationTime(compute, 1.0, measured.reduction, measured.fixed)
    if processes == 1:
        return IterationTime(compute, 1.0, 0.0, measured.fixed)
    assert links is not None
    backward = BACKWARD * measured.image * min(images, measured.pass_images)
    reduction = reduction_seconds(measured.gradient_bytes, processes, links, backward=backward)
    return IterationTime(compute, slowest(processes, spread), reduction, measured.fixed)


def slowest(processes: int, spread: float) -> float:
    """1 + σ·E[max of p standard normals]: how many times the mean the slowest of p processes takes."""
    if processes == 1:
        return 1.0
    normal = NormalDist()
    points = (STEP * (number + 0.5) for number in range(round(REACH / STEP)))
    # E[max] = ∫₀^∞ 1 − F^p − ∫_−∞^0 F^p
    expected = sum(1 - normal.cdf(x) ** processes - normal.cdf(-x) ** processes for x in points)
    return 1 + spread * STEP * expected


def reduction_seconds(size: int, processes: int, links: Links, *, backward: float) -> float:
    """How long the sum of a vector outlasts backward.

    The vector goes in m buckets, one after another, of which the i-th is complete at i/m of the last backward. So the
    last one always comes after it, and of each other what it takes longer than backward does for a bucket.

    Args:
        size: bytes.
        backward: seconds of the last backward.
    """
    buckets = -(-size // BUCKET_BYTES)

    def ring(part: int) -> float:
        return 2 * (processes - 1) * (8 * part / processes / links.bandwidth + links.latency)

    outlasts = max(0.0, ring(BUCKET_BYTES) - backward / buckets)
    return ring(size - (buckets - 1) * BUCKET_BYTES) + (buckets - 1) * outlasts

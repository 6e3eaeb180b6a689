"""What an iteration costs on p processes, against formulas and against draws."""

import dataclasses
import math

import numpy as np
import pytest

from onehour.dist.cost import BUCKET_BYTES, Links, Measured, expected_iteration, reduction_seconds, slowest

RUN = Measured(2, image=1e-3, fixed=0.02, reduction=0.3, spread=0.1, gradient_bytes=10**7, pass_images=64)
LINKS = Links(bandwidth=1e9, latency=1e-4)


@pytest.mark.parametrize(
    ("processes", "expected"), [(2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (1, 0.0), (256, None)]
)
def test_the_slowest_of_p_normals(processes: int, expected: float | None):
    if expected is None:
        draws = np.random.default_rng(0).standard_normal((20_000, processes)).max(axis=1)
        assert slowest(processes, 1.0) - 1 == pytest.approx(draws.mean(), abs=5 * draws.std() / 20_000**0.5)
    else:
        assert slowest(processes, 1.0) - 1 == pytest.approx(expected, abs=1e-9)
    assert slowest(processes, 0.0) == 1.0


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_a_vector_of_one_bucket_is_a_ring_that_nothing_hides(processes: int):
    ring = 2 * (processes - 1) / processes * 8e6 / 1e9 + 2 * (processes - 1) * 1e-4
    for backward in (0.0, 100.0):
        assert reduction_seconds(10**6, processes, LINKS, backward=backward) == pytest.approx(ring, rel=1e-12)


@pytest.mark.parametrize("backward", [0.0, 0.1, 0.5, 1.0, 5.0])
def test_of_several_buckets_what_outlasts_backward_is_waited_for(backward: float):
    """Beside a network that sends each as soon as it is complete and the one before has gone."""
    buckets, free = 4, 0.0
    for number in range(1, buckets + 1):
        free = max(free, backward * number / buckets) + reduction_seconds(BUCKET_BYTES, 4, LINKS, backward=0.0)
    found = reduction_seconds(buckets * BUCKET_BYTES, 4, LINKS, backward=backward)
    assert found == pytest.approx(free - backward, rel=1e-12)


def test_as_many_processes_as_the_run_had_take_what_it_measured():
    time = expected_iteration(RUN, images=128, processes=2, links=None, spread=0.5)
    assert time.seconds == pytest.approx(0.128 + 0.3 + 0.02)


def test_one_process_waits_for_nobody():
    time = expected_iteration(RUN, images=128, processes=1, links=None, spread=0.5)
    assert time.seconds == pytest.approx(0.128 + 0.02)


def test_other_processes_wait_for_the_slowest_and_the_links():
    time = expected_iteration(RUN, images=64, processes=4, links=LINKS, spread=0.1)
    assert time.compute == pytest.approx(0.064)
    assert time.slowest == pytest.approx(1.10294, abs=1e-4)  # E[max of 4] = 1.0294
    assert time.reduction == pytest.approx(reduction_seconds(10**7, 4, LINKS, backward=0.0))
    assert time.seconds == pytest.approx(0.064 * time.slowest + time.reduction + 0.02)


def test_backward_hides_by_what_is_in_the_last_pass():
    run = dataclasses.replace(RUN, gradient_bytes=4 * BUCKET_BYTES)
    few, many = (
        expected_iteration(
            dataclasses.replace(run, pass_images=images), images=4096, processes=4, links=LINKS, spread=0
        )
        for images in (64, 4096)
    )
    assert many.reduction == reduction_seconds(BUCKET_BYTES, 4, LINKS, backward=0.0)
    assert few.reduction == reduction_seconds(4 * BUCKET_BYTES, 4, LINKS, backward=2 / 3 * 0.064) > many.reduction

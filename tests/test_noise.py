"""The noise scale, from numbers alone: unbiased at a point, pooled over points, and as sure as they are."""

import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch

import onehour
from onehour.noise import FEWEST, noise_scale, trace_and_square


def test_a_point_is_unbiased_and_the_naive_estimates_are_not():
    gradients = np.random.default_rng(0).normal(size=(5, 3))  # of all samples that there are
    mean = gradients.mean(0)
    trace, square = ((gradients - mean) ** 2).sum(1).mean(), mean @ mean
    found, naive = [], []
    for drawn in itertools.product(range(5), repeat=3):
        chosen = gradients[list(drawn)]
        small, big = (chosen**2).sum(1).mean(), (chosen.mean(0) ** 2).sum()
        found.append(trace_and_square(small, big, small_size=1, big_size=3))
        naive.append(((chosen - chosen.mean(0)) ** 2).sum(1).mean())
    assert np.mean(found, axis=0) == pytest.approx([trace, square], rel=1e-12)
    assert np.mean(naive) == pytest.approx(trace * 2 / 3, rel=1e-12)


def test_points_are_pooled_before_the_division():
    points = [(100.0, 0.5), (100.0, 1.5)] * 6
    assert noise_scale(points).scale == pytest.approx(100)
    assert statistics.fmean(trace / square for trace, square in points) == pytest.approx(133, abs=1)


def test_the_intervals_ends_are_where_students_test_is():
    rng = np.random.default_rng(1)
    points = np.stack((rng.normal(100, 10, 12), rng.normal(1, 0.5, 12)), 1)
    found = noise_scale([(float(trace), float(square)) for trace, square in points])
    assert found.low is not None
    assert found.high is not None
    assert found.scale is not None
    assert found.low < found.scale < found.high
    for end in (found.low, found.high):
        differences = points[:, 0] - end * points[:, 1]
        t = differences.mean() / (differences.std(ddof=1) / 12**0.5)
        assert abs(t) == pytest.approx(2.200985, abs=1e-4)  # the 97.5 % point for 11 degrees of freedom


def test_where_the_square_is_not_above_its_error_it_is_not_estimable_and_only_bounded_from_below():
    few = noise_scale([(100.0, 1.0), (110.0, -0.5), (90.0, 0.4)])
    assert (few.scale, few.high) == (None, None)
    assert few.low is not None
    assert few.low > 0
    below = noise_scale([(100.0, -1.0), (110.0, -1.1), (90.0, -0.9)])
    assert (below.scale, below.low, below.high) == (None, None, None)


def test_points_that_rounding_alone_tells_apart_and_traces_below_zero():
    trace, square = 0.7886689660741341, 0.3136096185436008
    same = noise_scale([(trace, square)] * 3)
    assert (same.low, same.scale, same.high) == (pytest.approx(trace / square),) * 3
    below = noise_scale([(-1.0, 1.0), (-1.1, 1.1), (-0.9, 1.05)])
    assert (below.scale, below.low, below.high) == (None, None, None)


@pytest.mark.parametrize(("count", "factor"), [(2, 12.7062), (3, 4.30265), (4, 3.18245)])
def test_few_points_have_students_factor(count: int, factor: float):
    points = [(100.0 + 0.1 * number, 1.0) for number in range(count)]
    found = noise_scale(points)
    half = factor * statistics.stdev(trace for trace, _ in points) / count**0.5
    assert found.high == pytest.approx(statistics.fmean(trace for trace, _ in points) + half, abs=1e-3)


def test_more_points_of_the_same_kind_narrow_the_interval():
    points = [(90.0, 1.2), (110.0, 0.8), (100.0, 1.0), (100.0, 1.3)]
    few, many = noise_scale(points * (FEWEST // 4)), noise_scale(points * FEWEST)
    ends = (few.low, many.low, many.high, few.high)
    assert None not in ends
    assert list(ends) == sorted(set(ends))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("sizes", [(0, 4), (4, 4), (8, 4)])
def test_sizes_that_tell_nothing_are_refused(sizes: tuple[int, int]):
    with pytest.raises(ValueError, match="small_size must be from 1 to below big_size"):
        trace_and_square(1.0, 1.0, small_size=sizes[0], big_size=sizes[1])


def test_norms_may_be_tensors_as_a_loop_has_them():
    norms: Any = torch.tensor([5.0, 5.1, 2.0])
    points = [trace_and_square(small, norms[2], small_size=1, big_size=4) for small in norms[:2]]
    assert points[0] == (4.0, 1.0)
    assert noise_scale(points).scale == pytest.approx(4.1, abs=0.1)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_point_that_is_not_finite_is_refused(norm: float):
    points = [trace_and_square(small, 2.0, small_size=1, big_size=4) for small in (5.0, norm, 5.2)]
    with pytest.raises(ValueError, match=rf"points must be finite, got \({norm}, .*leave out"):
        noise_scale(points)


def test_one_point_is_refused():
    with pytest.raises(ValueError, match="needs at least two points, got 1"):
        noise_scale([(1.0, 1.0)])


def test_the_module_loads_by_its_name():
    assert vars(onehour.noise)["noise_scale"] is noise_scale

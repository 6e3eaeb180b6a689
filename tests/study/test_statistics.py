"""The tests behind verdicts, against scipy, by hand and by their properties."""

import itertools
import math
import statistics
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from onehour.study.statistics import (
    Sample,
    early_gap,
    holm,
    mean_curve,
    p_holds,
    p_worse,
    smallest_p,
    welch_upper,
)

ERRORS = st.floats(0, 100, allow_subnormal=False).map(lambda error: round(error, 3))
RUNS = st.lists(ERRORS, min_size=2, max_size=7)
TIED = st.lists(st.integers(0, 4), min_size=1, max_size=6)
PS = st.lists(st.floats(0, 1), max_size=12)


def known(values: list[float]) -> Sample:
    """The same runs, of which only a table's entry is left."""
    return Sample.known(statistics.fmean(values), statistics.stdev(values), len(values))


def shifted(values: list[float], by: float) -> Sample:
    return Sample.of([value + by for value in values])


def spread(values: list[float]) -> bool:
    return len(set(values)) > 1


def test_a_sample_is_mean_and_std_with_n_minus_1():
    sample = Sample.of([3.0, 4.0, 8.0])
    assert (sample.mean, sample.std, sample.n) == (5.0, pytest.approx(math.sqrt(7)), 3)
    assert sample.values == (3.0, 4.0, 8.0)


def test_one_run_has_no_std_and_none_no_mean():
    assert math.isnan(Sample.of([3.0]).std)
    assert math.isnan(Sample.of([]).mean)
    assert Sample.of([]).n == 0
    assert Sample.of([0.1] * 7).std == 0  # exactly, and not 1e-17


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sample.of([3.0, math.nan]), "has the error of chance"),
        (lambda: Sample.of([math.inf]), "has the error of chance"),
        (lambda: Sample.known(3.0, -0.1, 5), "std must be finite and not below zero"),
        (lambda: Sample.known(3.0, math.nan, 5), "std must be finite and not below zero"),
        (lambda: Sample.known(3.0, 0.2, 1), "1 run has no std"),
        (lambda: Sample.known(math.nan, 0.2, 5), "finite errors"),
        (lambda: Sample.known(3.0, 0.2, -1), "n of at least 0"),
        (lambda: Sample(3.0, 0.2, 3, (3.0, 3.1)), "n is 3, but there are 2 values"),
    ],
)
def test_a_sample_that_cannot_be_is_refused(make, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@given(RUNS.filter(spread), RUNS.filter(spread), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_upper_end_is_scipys(a: list[float], b: list[float], level: float):
    interval = stats.ttest_ind(a, b, equal_var=False, alternative="less").confidence_interval(level)  # pyright: ignore
    for first, second in ((Sample.of(a), Sample.of(b)), (known(a), known(b))):
        assert welch_upper(first, second, level) == pytest.approx(interval.high, rel=1e-9, abs=1e-9)


@given(RUNS.filter(spread), RUNS.filter(spread), st.floats(-1, 1))
def test_welchs_p_are_scipys(a: list[float], b: list[float], margin: float):
    worse = stats.ttest_ind(a, b, equal_var=False, alternative="greater")
    holds = stats.ttest_ind([value - margin for value in a], b, equal_var=False, alternative="less")
    assert p_worse(known(a), known(b)) == pytest.approx(worse.pvalue, rel=1e-6, abs=1e-12)  # pyright: ignore
    assert p_worse(Sample.of(a), known(b)) == p_worse(known(a), Sample.of(b)) == p_worse(known(a), known(b))
    assert p_holds(Sample.of(a), Sample.of(b), margin) == pytest.approx(holds.pvalue, rel=1e-6, abs=1e-12)  # pyright: ignore


@given(RUNS, RUNS, st.floats(0.01, 2), st.sampled_from([0.9, 0.95]))
def test_an_upper_end_under_the_margin_is_a_small_p(a: list[float], b: list[float], margin: float, level: float):
    upper, p = welch_upper(Sample.of(a), Sample.of(b), level), p_holds(Sample.of(a), Sample.of(b), margin)
    assert math.isclose(upper, margin, abs_tol=1e-6) or (upper < margin) == (p < 1 - level)


@given(RUNS.filter(spread), RUNS)
def test_welch_of_exchanged_sides_is_the_complement(a: list[float], b: list[float]):
    assert p_worse(known(a), known(b)) + p_worse(known(b), known(a)) == pytest.approx(1)
    lower = -welch_upper(Sample.of(b), Sample.of(a))
    assert lower <= Sample.of(a).mean - Sample.of(b).mean <= welch_upper(Sample.of(a), Sample.of(b))


@given(RUNS, RUNS, st.floats(0.01, 5))
def test_larger_errors_are_worse_and_hold_less(a: list[float], b: list[float], more: float):
    base, moved = Sample.of(b), shifted(a, more)
    assert p_worse(moved, base) <= p_worse(Sample.of(a), base)
    assert p_holds(moved, base, 0.5) >= p_holds(Sample.of(a), base, 0.5)
    assert p_holds(moved, base, 0.5 + more) == pytest.approx(p_holds(Sample.of(a), base, 0.5), abs=1e-6)


@pytest.mark.parametrize(("same", "other"), [(0.2, 0.0), (0.0, 0.2)])
def test_one_side_without_spread_leaves_the_others_degrees_of_freedom(same: float, other: float):
    upper = welch_upper(Sample.known(4.0, same, 5), Sample.known(3.5, other, 5))
    assert upper == pytest.approx(0.5 + stats.t.ppf(0.95, 4) * 0.2 / math.sqrt(5))


def test_without_any_spread_the_difference_decides():
    a, b = Sample.of([4.1] * 5), Sample.of([3.6] * 5)
    assert welch_upper(a, b) == a.mean - b.mean
    assert (p_holds(a, b, 0.6), p_holds(a, b, 0.4)) == (0, 1)
    assert p_holds(a, b, 0.5) == 1  # though 4.1 - 3.6 falls short of it by a rounding
    assert a.mean - b.mean < 0.5
    assert (p_worse(known([4.1] * 5), known([3.6] * 5)), p_worse(known([3.6] * 5), known([3.6] * 5))) == (0, 1)


@pytest.mark.parametrize("std", [1e-160, 1e-8, 1e8])
def test_stds_of_any_size_are_compared(std: float):
    same = Sample.known(3.0, std, 5)
    assert welch_upper(same, same) == pytest.approx(stats.t.ppf(0.95, 8) * std * math.sqrt(0.4), rel=1e-6)
    assert p_worse(same, same) == 0.5


def test_a_run_at_chance_breaks_nothing():
    a, b = [3.5, 3.4, 3.6, 90.0, 3.3], [3.4, 3.5, 3.3, 3.6, 3.2]
    upper = welch_upper(Sample.of(a), Sample.of(b))
    assert upper > 50
    assert 0.5 > p_worse(Sample.of(a), Sample.of(b)) > 0.05
    assert p_worse(Sample.of([90.0] * 5), Sample.of(b)) == 1 / 252


@given(st.lists(ERRORS, min_size=2, max_size=14, unique=True), st.data())
def test_ranks_without_ties_are_scipys_exact(errors: list[float], data: st.DataObject):
    cut = data.draw(st.integers(1, len(errors) - 1))
    expected = stats.mannwhitneyu(errors[:cut], errors[cut:], alternative="greater", method="exact").pvalue
    assert p_worse(Sample.of(errors[:cut]), Sample.of(errors[cut:])) == pytest.approx(expected, rel=1e-12)


@given(TIED, TIED)
def test_ranks_with_ties_are_the_share_of_all_arrangements(a: list[int], b: list[int]):
    ranks = stats.rankdata(a + b)
    sums = [sum(chosen) for chosen in itertools.combinations(ranks, len(a))]
    expected = sum(total >= sum(ranks[: len(a)]) for total in sums) / len(sums)
    assert p_worse(Sample.of(a), Sample.of(b)) == expected


def test_ranks_with_ties_are_scipys_permutations():
    a, b = [3.4, 3.5, 3.5, 3.7, 3.9], [3.2, 3.4, 3.4, 3.5, 3.6]
    every: Any = stats.PermutationMethod(n_resamples=10_000)
    expected = stats.mannwhitneyu(a, b, alternative="greater", method=every).pvalue
    assert p_worse(Sample.of(a), Sample.of(b)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [30, 31])
def test_many_runs_are_counted_and_still_more_are_scipys(n: int):
    errors = np.random.default_rng(n).normal(3.5, 0.2, (2, n))
    errors[0] += 0.1
    expected = stats.mannwhitneyu(*errors, alternative="greater", method="exact" if n == 30 else "auto").pvalue
    assert p_worse(*map(Sample.of, errors.tolist())) == pytest.approx(expected, rel=1e-9)
    assert 0.001 < expected < 0.1


@given(RUNS, RUNS)
def test_ranks_of_exchanged_sides_share_what_is_as_observed(a: list[float], b: list[float]):
    both = p_worse(Sample.of(a), Sample.of(b)) + p_worse(Sample.of(b), Sample.of(a))
    assert 1 < both <= 2
    assert p_worse(Sample.of(a), Sample.of(b)) >= smallest_p(Sample.of(a), Sample.of(b))


def test_the_smallest_p():
    worst, best = Sample.of([5.0, 6, 7, 8, 9]), Sample.of([0.0, 1, 2, 3, 4])
    assert smallest_p(worst, best) == p_worse(worst, best) == 1 / 252
    assert smallest_p(worst, Sample.known(3.0, 0.2, 5)) == 0


@pytest.mark.parametrize("n", [0, 1])
def test_a_test_needs_runs(n: int):
    few, enough = Sample.of([3.0] * n), Sample.of([3.0, 3.1])
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(ValueError, match="at least 2 runs on each side"):
            welch_upper(*pair)
        with pytest.raises(ValueError, match="at least 2 runs on each side"):
            p_holds(*pair, margin=0.5)
    with pytest.raises(ValueError, match="at least one run on each side"):
        p_worse(Sample.of([]), enough)


@pytest.mark.parametrize("level", [0, 1, 95, math.nan])
def test_a_level_is_a_share(level: float):
    with pytest.raises(ValueError, match="level must lie between 0 and 1"):
        welch_upper(Sample.of([3.0, 3.1]), Sample.of([3.0, 3.1]), level)


def test_without_scipy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in ("scipy", "scipy.special", "scipy.stats"):
        monkeypatch.setitem(sys.modules, name, None)
    a, b = Sample.of([3.0, 3.5]), Sample.of([3.0, 3.2])
    many = Sample.of([3.0 + i / 100 for i in range(40)])
    assert p_worse(a, b) == 0.5  # counted by ourselves
    for fails in (lambda: welch_upper(a, b), lambda: p_holds(a, b, 0.5), lambda: p_worse(many, many)):
        with pytest.raises(ValueError, match=r"pip install 'onehour\[report\]'"):
            fails()


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.5, 0.01]) == pytest.approx([0.8, 0.8, 0.03])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
    assert holm([1 / 252] * 13) == [13 / 252] * 13


@given(PS)
def test_holm_raises_keeps_order_and_stays_under_bonferroni(ps: list[float]):
    adjusted = holm(ps)
    assert all(p <= q <= min(1, len(ps) * p) for p, q in zip(ps, adjusted, strict=True))
    for first, second in itertools.combinations(range(len(ps)), 2):
        assert (ps[first] - ps[second]) * (adjusted[first] - adjusted[second]) >= 0


@given(PS)
def test_holm_rejects_what_stepping_down_rejects(ps: list[float]):
    rejected: set[int] = set()
    for place, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        if (len(ps) - place) * ps[index] >= 0.05:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(ps)) if p < 0.05} == rejected


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_holm_takes_probabilities(p: float):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        holm([0.5, p])


def test_curves_are_averaged_where_every_seed_has_been():
    assert mean_curve([[(2, 20.0), (1, 40.0)], [(1, 60.0), (2, 30.0), (3, 9.0)]]) == [(1, 50.0), (2, 25.0)]
    assert mean_curve([]) == []


BASE = [(1, 50.0), (2, 40.0), (3, 30.0), (4, 20.0)]


def test_the_early_gap_counts_from_after_warmup_to_the_first_drop():
    curve = [(1, 90.0), (2, 80.0), (3, 32.0), (4, 23.0), (5, 99.0)]
    assert early_gap(curve, BASE, start=2, stop=4) == 2.5
    assert early_gap(curve, BASE, start=1, stop=3) == 21
    assert early_gap(BASE, BASE, start=0, stop=4) == 0
    assert early_gap(BASE, curve, start=2, stop=4) == -2.5


def test_the_base_is_straight_between_its_epochs_and_nothing_outside():
    assert early_gap([(2.5, 36.0)], BASE, start=2, stop=4) == 1
    assert math.isnan(early_gap([(4.5, 36.0)], BASE, start=2, stop=9))
    assert math.isnan(early_gap(BASE, BASE, start=4, stop=9))
    assert math.isnan(early_gap(BASE, [], start=0, stop=9))

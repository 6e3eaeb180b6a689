"""Verdicts and the intervals behind them, against scipy and by hand: each of two samples alone."""

import math
import statistics
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from onehour.study.verdict import Sample, Verdict, break_share, breaks, interval, judge, points

ERRORS = st.floats(0, 100, allow_subnormal=False).map(lambda error: round(error, 3))
RUNS = st.lists(ERRORS, min_size=2, max_size=7).filter(lambda runs: len(set(runs)) > 1)

REFERENCE = Sample.of([3.4, 3.5, 3.3, 3.6, 3.2])
WITHIN = Sample.of([3.5, 3.4, 3.3, 3.6, 3.4])
BEYOND = Sample.of([4.4, 4.5, 4.3, 4.6, 4.7])
ABOVE = Sample.of([3.7, 3.6, 3.9, 3.8, 4.1])
UNDECIDED = Sample.of([3.7, 3.4, 3.9, 3.0, 4.1])


def known(values: list[float]) -> Sample:
    """The same runs, of which only a table's entry is left."""
    return Sample(statistics.fmean(values), statistics.stdev(values), len(values))


def test_a_sample_is_mean_and_std_with_n_minus_1():
    sample = Sample.of([3.0, 4.0, 8.0], [7, 8, 9])
    assert (sample.mean, sample.std, sample.n) == (5.0, pytest.approx(math.sqrt(7)), 3)
    assert sample.by_seed == {7: 3.0, 8: 4.0, 9: 8.0}
    assert math.isnan(Sample.of([3.0]).std)
    assert math.isnan(Sample.of([]).mean)
    assert Sample.of([0.1] * 7).std == 0  # exactly, and not 1e-17


@pytest.mark.parametrize("seeds", [(), (1, None), (1, 1)])
def test_runs_without_a_seed_each_have_no_pairs(seeds: tuple[int | None, ...]):
    assert Sample.of([3.0, 4.0], seeds).by_seed == {}


@given(RUNS, RUNS, st.sampled_from([0.05, 0.025, 0.3]))
def test_welchs_interval_is_scipys(a: list[float], b: list[float], error: float):
    expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(1 - 2 * error)  # pyright: ignore
    for first, second in ((Sample.of(a), Sample.of(b)), (known(a), known(b))):
        found = interval(first, second, error=error)
        assert found == pytest.approx((statistics.fmean(a) - statistics.fmean(b), *expected), rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(ERRORS, ERRORS), min_size=2, max_size=7).filter(lambda r: len({a - b for a, b in r}) > 1))
def test_the_paired_interval_is_scipys_whatever_the_seeds_order(runs: list[tuple[float, float]]):
    a, b = (list(side) for side in zip(*runs, strict=True))
    expected = stats.ttest_rel(a, b).confidence_interval(0.9)  # pyright: ignore
    seeds = list(range(len(runs)))
    second = Sample.of([*reversed(b), 50.0], [*reversed(seeds), 99])  # which has one more
    found = interval(Sample.of(a, seeds), second, paired=True)
    assert found[1:] == pytest.approx(tuple(expected), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("same", "other"), [(0.2, 0.0), (0.0, 0.2)])
def test_one_side_without_spread_leaves_the_others_degrees_of_freedom(same: float, other: float):
    upper = interval(Sample(4.0, same, 5), Sample(3.5, other, 5))[2]
    assert upper == pytest.approx(0.5 + stats.t.ppf(0.95, 4) * 0.2 / math.sqrt(5))


@pytest.mark.parametrize(
    ("above", "state"), [(0.6, "beyond"), (0.5, "above"), (0.4, "within"), (0.0, "within"), (-1.0, "within")]
)
def test_without_any_spread_the_difference_decides(above: float, state: str):
    """At the margin too, though 4.1 − 3.6 falls short of it by a rounding."""
    assert judge(Sample.of([3.6 + above] * 5), Sample.of([3.6] * 5)).state == state


@pytest.mark.parametrize(
    ("sample", "state", "text"),
    [
        (WITHIN, "within", "within the margin: +0.04 [−0.12, +0.20]"),
        (BEYOND, "beyond", "beyond the margin: +1.10 [+0.91, +1.29]"),
        (ABOVE, "above", "above zero, margin open: +0.42 [+0.21, +0.63]; about 23 more seeds would decide"),
        (UNDECIDED, "undecided", "undecided: +0.22 [−0.19, +0.63]; about 4 more seeds would decide"),
    ],
)
def test_a_state_is_where_the_interval_lies(sample: Sample, state: str, text: str):
    verdict = judge(sample, REFERENCE)
    assert verdict.text == text
    assert (verdict.state, verdict.paired, verdict.broke, verdict.n) == (state, False, 0, 5)
    assert verdict.open == (state in ("above", "undecided"))


@given(st.floats(-1, 2), st.floats(0.05, 0.6), st.floats(0.05, 0.6), st.integers(2, 8), st.integers(1, 3))
def test_states_are_exactly_the_four_places(difference: float, one: float, other: float, n: int, looks: int):
    a, b = Sample(3.5 + difference, one, n), Sample(3.5, other, 2 * n)
    verdict = judge(a, b, looks=looks)
    assert (verdict.difference, verdict.lower, verdict.upper) == interval(a, b, error=0.05 / looks)
    by_place = {
        "within": verdict.upper < 0.5,
        "beyond": verdict.lower > 0.5,
        "above": 0 < verdict.lower <= 0.5 <= verdict.upper,
        "undecided": verdict.lower <= 0 and verdict.upper >= 0.5,
    }
    assert [state for state, there in by_place.items() if there] == [verdict.state]


@given(st.floats(-0.5, 1.5), st.floats(0.05, 0.6), st.integers(2, 6))
def test_more_seeds_are_the_fewest_that_decide_about_the_margin(difference: float, std: float, n: int):
    """The reference has twice the seeds, and keeps twice."""
    verdict = judge(Sample(3.5 + difference, std, n), Sample(3.5, 0.2, 2 * n))
    if verdict.open:
        later = [
            judge(Sample(3.5 + difference, std, n + more), Sample(3.5, 0.2, 2 * (n + more))).open
            for more in range(1, (verdict.more_seeds or 100) + 1)
        ]
        assert all(later[:-1])
        assert later[-1] == (verdict.more_seeds is None)
    else:
        assert verdict.more_seeds is None


def test_what_a_hundred_seeds_do_not_decide_is_said_so():
    verdict = judge(Sample(3.75, 20.0, 5), Sample(3.5, 20.0, 5))
    assert verdict.text == "undecided: +0.25 [−23.27, +23.77]; more than 100 more seeds would decide"


def test_pairs_show_what_welch_cannot():
    """The recipe's seeds with something small in each; without the seeds, or with others, it is Welch's."""
    seeds, errors = [1, 2, 3, 4, 5], [3.0, 4.4, 3.6, 5.0, 4.1]
    recipe = Sample.of(errors, seeds)
    more = [error + extra for error, extra in zip(errors, (0.05, 0.08, 0.06, 0.07, 0.04), strict=True)]
    arm = Sample.of(more, seeds)
    verdict = judge(arm, recipe, pair=True)
    assert (verdict.paired, verdict.state) == (True, "within")
    assert verdict.lower > 0.04
    welch = judge(arm, recipe)
    assert (welch.paired, welch.state) == (False, "undecided")
    for other in (Sample.of(more), Sample.of(more, [1, 2, 3, 4, 6])):
        assert judge(other, recipe, pair=True) == welch


def test_the_papers_rate_of_a_fifth_is_within_whatever_else_was_run():
    """24.05 ± .18 beside 23.74 ± .09; a verdict takes two samples, so company cannot change it."""
    verdict = judge(Sample(24.05, 0.18, 5), Sample(23.74, 0.09, 5))
    assert verdict.text == "within the margin: +0.31 [+0.13, +0.49]"


@pytest.mark.parametrize(
    ("sample", "other", "text"),
    [
        (Sample.of([3.4]), REFERENCE, "no verdict: one seed has no std; train at least 2"),
        (Sample.of([]), REFERENCE, "no verdict: no run has ended"),
        (WITHIN, Sample.of([3.4]), "no verdict: one seed at the reference has no std; train at least 2"),
        (Sample.of([3.4]), Sample.of([3.4]), "no verdict: one seed has no std; train at least 2"),
        (WITHIN, Sample.of([]), "no verdict: no run has ended at the reference"),
        (WITHIN, Sample.of([3.4, 90.0], broke=1), "no verdict: 1 of 2 runs that it is compared with broke"),
        (Sample.of([90.0], broke=1), REFERENCE, "1 of 1 broke: 5 to 100 % do; +86.60 points on average"),
        (
            Sample.of([3.4, 3.5, 3.3, 90.0, 3.6], broke=1),
            REFERENCE,
            "1 of 5 broke: 1 to 66 % do; +17.36 points on average",
        ),
    ],
)
def test_too_few_runs_and_broken_ones_have_no_interval(sample: Sample, other: Sample, text: str):
    verdict = judge(sample, other)
    assert verdict.text == text
    assert verdict.state == ("broke" if sample.broke else "no verdict")
    assert math.isnan(verdict.lower)


@pytest.mark.parametrize(("broke", "n"), [(0, 5), (2, 5), (5, 5), (1, 10), (0, 1)])
def test_the_share_that_breaks_is_clopper_and_pearsons(broke: int, n: int):
    expected = stats.binomtest(broke, n).proportion_ci(0.9, method="exact")
    assert break_share(broke, n)[1] == pytest.approx(1 - 0.05 ** (1 / n) if not broke else expected.high)
    assert break_share(broke, n) == pytest.approx((expected.low, expected.high))


def test_what_was_not_seen_is_said():
    assert breaks(0, 5) == ("0 of 5", "up to 45 % may")
    assert breaks(2, 5) == ("2 of 5", "8 to 81 % do")


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("n", [1, 5, 10])
def test_each_end_of_that_share_is_wrong_in_at_most_one_of_twenty(rate: float, n: int):
    """Summed over every outcome."""
    for wrong in (lambda low, high: high < rate, lambda low, high: low > rate):
        assert sum(stats.binom.pmf(k, n, rate) for k in range(n + 1) if wrong(*break_share(k, n))) <= 0.05


def test_the_margin_and_the_looks_are_the_users():
    assert [judge(UNDECIDED, REFERENCE, margin).state for margin in (0.5, 1.0)] == ["undecided", "within"]
    assert [judge(Sample(3.75, 0.2, 5), Sample(3.5, 0.2, 10), looks=n).state for n in (1, 2)] == ["within", "undecided"]
    with pytest.raises(ValueError, match="margin must be"):
        judge(WITHIN, REFERENCE, margin=0)
    with pytest.raises(ValueError, match="looks must be above zero"):
        judge(WITHIN, REFERENCE, looks=0)


def test_without_scipy_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"pip install 'onehour\[report\]'"):
        judge(WITHIN, REFERENCE)


def test_points_have_their_sign():
    assert [points(value) for value in (0.4, -0.4, -0.001, math.nan)] == ["+0.40", "−0.40", "0.00", "–"]
    assert Verdict("within", 0.0, -0.1, 0.1).found == "0.00 [−0.10, +0.10]"

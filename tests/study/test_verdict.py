"""Verdicts and the tests behind them, against scipy and by hand: minibatches in sequence, arms under Holm."""

import itertools
import math
import statistics
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from onehour.study.verdict import (
    Sample,
    Verdict,
    holm,
    judge_arms,
    judge_minibatches,
    p_holds,
    p_worse,
    smallest_p,
    welch_upper,
)

ERRORS = st.floats(0, 100, allow_subnormal=False).map(lambda error: round(error, 3))
RUNS = st.lists(ERRORS, min_size=2, max_size=7).filter(lambda runs: len(set(runs)) > 1)
TIED = st.lists(st.integers(0, 4), min_size=1, max_size=6)

REFERENCE = Sample.of([3.4, 3.5, 3.3, 3.6, 3.2])
HOLDS = Sample.of([3.5, 3.4, 3.3, 3.6, 3.4])
WORSE = Sample.of([4.4, 4.5, 4.3, 4.6, 4.7])
UNDECIDED = Sample.of([3.7, 3.4, 3.9, 3.3, 4.1])
BROKEN = Sample.of([90.0] * 5)
ONE, NONE = Sample.of([3.4]), Sample.of([])


def known(values: list[float]) -> Sample:
    """The same runs, of which only a table's entry is left."""
    return Sample(statistics.fmean(values), statistics.stdev(values), len(values))


def judged(**entries: Sample) -> dict[int, Verdict]:
    """Verdicts of m64=… against REFERENCE at 32."""
    return judge_minibatches(32, {32: REFERENCE, **{int(name[1:]): sample for name, sample in entries.items()}})


def states(verdicts: dict[int, Verdict]) -> list[str]:
    return [verdict.state for verdict in verdicts.values()]


def by_scipy(a: Sample, b: Sample, more: int, margin: float = 0.5) -> bool:
    """Whether Welch's test alone decides with so many more seeds."""
    sides = (a.mean, a.std, a.n + more, b.mean, b.std, b.n + more)
    lower = (a.mean - margin, *sides[1:])
    holds = stats.ttest_ind_from_stats(*lower, equal_var=False, alternative="less").pvalue
    worse = stats.ttest_ind_from_stats(*sides, equal_var=False, alternative="greater").pvalue
    return min(holds, worse) < 0.05


def test_a_sample_is_mean_and_std_with_n_minus_1():
    sample = Sample.of([3.0, 4.0, 8.0])
    assert (sample.mean, sample.std, sample.n) == (5.0, pytest.approx(math.sqrt(7)), 3)
    assert sample.values == (3.0, 4.0, 8.0)
    assert math.isnan(ONE.std)
    assert math.isnan(NONE.mean)
    assert Sample.of([0.1] * 7).std == 0  # exactly, and not 1e-17


@given(RUNS, RUNS, st.floats(-1, 1), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_welchs_interval_and_p_are_scipys(a: list[float], b: list[float], margin: float, level: float):
    interval = stats.ttest_ind(a, b, equal_var=False, alternative="less").confidence_interval(level)  # pyright: ignore
    worse = stats.ttest_ind(a, b, equal_var=False, alternative="greater")
    holds = stats.ttest_ind([value - margin for value in a], b, equal_var=False, alternative="less")
    for first, second in ((Sample.of(a), Sample.of(b)), (known(a), known(b))):
        assert welch_upper(first, second, level) == pytest.approx(interval.high, rel=1e-9, abs=1e-9)
        assert p_holds(first, second, margin) == pytest.approx(holds.pvalue, rel=1e-6, abs=1e-12)  # pyright: ignore
    assert p_worse(known(a), known(b)) == pytest.approx(worse.pvalue, rel=1e-6, abs=1e-12)  # pyright: ignore
    assert p_worse(Sample.of(a), known(b)) == p_worse(known(a), Sample.of(b)) == p_worse(known(a), known(b))


@pytest.mark.parametrize(("same", "other"), [(0.2, 0.0), (0.0, 0.2)])
def test_one_side_without_spread_leaves_the_others_degrees_of_freedom(same: float, other: float):
    upper = welch_upper(Sample(4.0, same, 5), Sample(3.5, other, 5))
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
    same = Sample(3.0, std, 5)
    assert welch_upper(same, same) == pytest.approx(stats.t.ppf(0.95, 8) * std * math.sqrt(0.4), rel=1e-6)
    assert p_worse(same, same) == 0.5


@given(TIED, TIED)
def test_ranks_with_ties_are_the_share_of_all_arrangements(a: list[int], b: list[int]):
    ranks = stats.rankdata(a + b)
    sums = [sum(chosen) for chosen in itertools.combinations(ranks, len(a))]
    expected = sum(total >= sum(ranks[: len(a)]) for total in sums) / len(sums)
    assert p_worse(Sample.of(a), Sample.of(b)) == expected >= smallest_p(Sample.of(a), Sample.of(b))


@pytest.mark.parametrize("n", [30, 31])
def test_many_runs_are_counted_and_still_more_are_scipys(n: int):
    errors = np.random.default_rng(n).normal(3.5, 0.2, (2, n))
    errors[0] += 0.1
    expected = stats.mannwhitneyu(*errors, alternative="greater", method="exact" if n == 30 else "auto").pvalue
    assert p_worse(*map(Sample.of, errors.tolist())) == pytest.approx(expected, rel=1e-9)
    assert 0.001 < expected < 0.1


def test_the_smallest_p():
    worst, best = Sample.of([5.0, 6, 7, 8, 9]), Sample.of([0.0, 1, 2, 3, 4])
    assert smallest_p(worst, best) == p_worse(worst, best) == 1 / 252
    assert smallest_p(worst, best, more=1) == 1 / math.comb(12, 6)
    assert smallest_p(worst, Sample(3.0, 0.2, 5)) == 0


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
    assert holm([]) == []
    assert holm([1 / 252] * 13) == [13 / 252] * 13


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_what_stepping_down_rejects(ps: list[float]):
    rejected: set[int] = set()
    for place, index in enumerate(sorted(range(len(ps)), key=lambda index: ps[index])):
        if (len(ps) - place) * ps[index] >= 0.05:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(ps)) if p < 0.05} == rejected


def test_what_holds_is_never_worse():
    """.1 above in every run is significant by ranks, and far within the margin."""
    close = Sample.of([3.31, 3.32, 3.33, 3.34, 3.35])
    (verdict,) = judge_minibatches(1, {1: Sample.of([3.21, 3.22, 3.23, 3.24, 3.25]), 2: close}).values()
    assert verdict.p == 1 / 252
    assert verdict.state == "holds"


@pytest.mark.parametrize(("stopper", "why"), [(WORSE, "does not hold"), (UNDECIDED, "is undecided"), (ONE, "has no")])
def test_nothing_is_tested_behind_the_first_that_does_not_hold(stopper: Sample, why: str):
    verdicts = judged(m512=BROKEN, m64=HOLDS, m128=stopper, m256=HOLDS)
    assert list(verdicts) == [64, 128, 256, 512]
    expected = {id(WORSE): "worse", id(UNDECIDED): "undecided", id(ONE): "one seed"}[id(stopper)]
    assert states(verdicts) == ["holds", expected, "untested", "untested"]
    for size in (256, 512):
        assert verdicts[size].text.startswith(f"not tested: minibatch 128 {why}")
    assert verdicts[512].difference == pytest.approx(86.6)
    assert math.isnan(verdicts[512].p)


def test_minibatches_below_the_reference_are_a_sequence_of_their_own():
    verdicts = judge_minibatches(32, {8: HOLDS, 16: WORSE, 32: REFERENCE, 64: HOLDS, 128: WORSE})
    assert list(verdicts) == [8, 16, 64, 128]
    assert states(verdicts) == ["untested", "worse", "holds", "worse"]
    assert verdicts[8].text == "not tested: minibatch 16 does not hold; 0.04 points above"
    assert judge_minibatches(32, {32: REFERENCE}) == {}


def test_one_seed_gets_no_verdict():
    few, none = "one seed{}: no std, so no verdict; give at least 2 seeds", "no run has ended{}, so no verdict"
    at_reference = " at the reference"
    verdicts = judged(m64=ONE, m128=NONE)
    assert [verdict.text for verdict in verdicts.values()] == [few.format(""), none.format("")]
    assert verdicts[64].difference == pytest.approx(0)
    lone = judge_minibatches(32, {32: ONE, 64: HOLDS, 128: ONE, 256: NONE})
    assert set(states(verdicts) + states(lone)) == {"one seed"}
    assert [v.text for v in lone.values()] == [few.format(at_reference), few.format(""), none.format("")]
    assert judge_minibatches(32, {32: NONE, 64: HOLDS})[64].text == none.format(at_reference)
    arms = judge_arms([(ONE, REFERENCE), (WORSE, REFERENCE), (WORSE, NONE), (HOLDS, REFERENCE)])
    assert [verdict.state for verdict in arms] == ["one seed", "worse", "one seed", "holds"]
    assert [verdict.family for verdict in arms] == [1, 2, 1, 2]


def test_runs_at_chance_are_judged_like_others():
    assert judged(m64=BROKEN)[64].text == "worse: 86.60 points, p = 0.004"
    one_broke = Sample.of([3.4, 3.5, 3.3, 90.0, 3.6])
    assert (judged(m64=one_broke)[64].state, judged(m64=one_broke)[64].more_seeds) == ("undecided", 11)
    broken_reference = judge_minibatches(32, {32: one_broke, 64: HOLDS})[64]
    assert broken_reference.text == "undecided: -17.32 points, needs 10 more seeds"
    assert judge_minibatches(32, {32: BROKEN, 64: BROKEN})[64].text == "holds: at most 0.00 points above"


@given(st.floats(-0.5, 1.5), st.floats(0.05, 0.6), st.floats(0.05, 0.6), st.integers(2, 8))
def test_more_seeds_are_the_fewest_that_decide_by_welch(difference: float, one: float, other: float, n: int):
    a, b = Sample(3.5 + difference, one, n), Sample(3.5, other, n)
    verdict = judge_minibatches(1, {1: b, 2: a})[2]
    if verdict.state != "undecided":
        assert by_scipy(a, b, 0)
    elif verdict.more_seeds is None:
        assert not by_scipy(a, b, 100)
    else:
        assert by_scipy(a, b, verdict.more_seeds)
        assert not any(by_scipy(a, b, fewer) for fewer in range(verdict.more_seeds))


def test_no_fewer_seeds_are_promised_than_ranks_need():
    """By Welch two seeds would do; ranks need four, since 3 against 3 give p ≥ 1/20."""
    verdict = judge_minibatches(32, {32: Sample.of([3.4, 3.5]), 64: Sample.of([9.4, 9.5])})[64]
    assert (verdict.state, verdict.more_seeds, verdict.out_of_reach) == ("undecided", 2, True)
    assert verdict.text == "undecided: 6.00 points, needs 2 more seeds; so few seeds cannot show worse"
    three = judge_minibatches(32, {32: Sample.of([3.4, 3.5, 3.3]), 64: Sample.of([9.4, 9.5, 9.3])})[64]
    assert (three.state, three.more_seeds, three.smallest_p, three.out_of_reach) == ("undecided", 1, 0.05, True)


def test_what_a_hundred_seeds_do_not_decide_is_said_so():
    verdict = judge_minibatches(1, {1: Sample(3.5, 20.0, 5), 2: Sample(3.75, 20.0, 5)})[2]
    assert verdict.text == "undecided: 0.25 points, needs more than 100 more seeds"
    last = judge_minibatches(1, {1: Sample(3.5, 1.75, 5), 2: Sample(3.6, 1.75, 5)})[2]
    assert last.more_seeds == 100


def test_the_margin_is_the_users():
    samples = {32: REFERENCE, 64: UNDECIDED}
    assert [judge_minibatches(32, samples, margin)[64].state for margin in (0.5, 1.0)] == ["undecided", "holds"]
    assert judge_minibatches(32, {32: REFERENCE, 64: WORSE}, margin=2)[64].state == "holds"
    for judge in (lambda: judge_minibatches(32, samples, margin=0), lambda: judge_arms([], margin=-1)):
        with pytest.raises(ValueError, match="margin must be"):
            judge()


def test_arms_are_corrected_by_holm_in_both_families():
    arms = [WORSE, HOLDS, UNDECIDED, BROKEN]
    verdicts = judge_arms([(arm, REFERENCE) for arm in arms])
    assert [verdict.p for verdict in verdicts] == holm([p_worse(arm, REFERENCE) for arm in arms])
    assert [verdict.p_holds for verdict in verdicts] == holm([p_holds(arm, REFERENCE, 0.5) for arm in arms])
    assert [verdict.state for verdict in verdicts] == ["worse", "holds", "undecided", "worse"]
    assert verdicts[0].text == "worse: 1.10 points, p = 0.016 (Holm, 4 arms)"
    assert verdicts[1].text == "holds: 0.04 points above, p = 0.002 (Holm, 4 arms)"
    assert judge_arms([]) == []
    for sample in arms:  # an arm alone is judged as a minibatch is
        assert judge_arms([(sample, REFERENCE)]) == [judged(m64=sample)[64]]


@pytest.mark.parametrize(("arms", "state", "reach"), [(12, "worse", False), (13, "undecided", True)])
def test_five_seeds_are_too_few_for_more_than_twelve_arms(arms: int, state: str, reach: bool):
    verdict = judge_arms([(BROKEN, REFERENCE)] * arms)[0]
    assert (verdict.state, verdict.out_of_reach) == (state, reach)
    assert verdict.smallest_p == pytest.approx(arms / 252)
    if reach:
        said = "undecided: 86.60 points, needs 1 more seed; among 13 arms so few seeds cannot show worse"
        assert verdict.text == said


def test_seeds_are_counted_for_all_arms_at_once():
    recipe = [Sample(3.5, 0.2, n) for n in range(5, 30)]
    arms = [(3.75, 0.2), (3.8, 0.2), (3.7, 0.3), (3.5, 0.7)]
    later = [judge_arms([(Sample(*arm, base.n), base) for arm in arms]) for base in recipe]
    for place, now in enumerate(later[0]):
        decided = [more for more, verdicts in enumerate(later) if verdicts[place].state != "undecided"]
        assert now.more_seeds == decided[0] > 1


@given(st.lists(st.tuples(st.floats(-1, 3), st.floats(0.05, 1)), min_size=2, max_size=6))
def test_company_never_helps_an_arm(arms: list[tuple[float, float]]):
    recipe = Sample(3.5, 0.2, 5)
    pairs = [(Sample(3.5 + difference, std, 5), recipe) for difference, std in arms]
    for pair, together in zip(pairs, judge_arms(pairs), strict=True):
        (alone,) = judge_arms([pair])
        assume(min(abs(alone.p - 0.05), abs(alone.p_holds - 0.05)) > 1e-9)
        assert together.p >= alone.p
        assert together.p_holds >= alone.p_holds
        assert alone.state == together.state or together.state == "undecided" or alone.state == "holds"
        assert alone.more_seeds is None or (together.more_seeds or 101) >= alone.more_seeds


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (Verdict("holds", -0.5, upper=-0.12), "holds: at least 0.12 points below"),
        (Verdict("worse", 1.05, p=0.0004), "worse: 1.05 points, p < 0.001"),
        (Verdict("worse", 1.05, p=0.0496), "worse: 1.05 points, p = 0.0496"),
        (Verdict("undecided", -0.001, more_seeds=1), "undecided: 0.00 points, needs 1 more seed"),
        (Verdict("untested", -0.2, why="it broke"), "not tested: it broke; 0.20 points below"),
    ],
)
def test_words(verdict: Verdict, text: str):
    assert verdict.text == text

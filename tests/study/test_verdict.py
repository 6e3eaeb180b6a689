"""Verdicts: of minibatches in their fixed sequence, of arms under Holm, with too few seeds, in words."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from onehour.study.statistics import Sample, holm, p_holds, p_worse
from onehour.study.verdict import Verdict, judge_arms, judge_minibatches, summary

REFERENCE = Sample.of([3.4, 3.5, 3.3, 3.6, 3.2])
HOLDS = Sample.of([3.5, 3.4, 3.3, 3.6, 3.4])
WORSE = Sample.of([4.4, 4.5, 4.3, 4.6, 4.7])
UNDECIDED = Sample.of([3.7, 3.4, 3.9, 3.3, 4.1])
BROKEN = Sample.of([90.0] * 5)
ONE, NONE = Sample.of([3.4]), Sample.of([])


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


def test_the_four_states():
    verdicts = judged(m64=HOLDS, m128=UNDECIDED, m256=HOLDS)
    assert states(verdicts) == ["holds", "undecided", "untested"]
    assert judged(m64=WORSE)[64].state == "worse"
    assert judged(m64=WORSE)[64].p == 1 / 252
    assert 32 not in verdicts


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
    assert states(verdicts)[0] == "holds"
    assert states(verdicts)[2:] == ["untested", "untested"]
    for size in (256, 512):
        assert verdicts[size].text.startswith(f"not tested: minibatch 128 {why}")
    assert verdicts[512].difference == pytest.approx(86.6)
    assert math.isnan(verdicts[512].p)


def test_minibatches_below_the_reference_are_a_sequence_of_their_own():
    samples = {8: HOLDS, 16: WORSE, 32: REFERENCE, 64: HOLDS, 128: WORSE}
    verdicts = judge_minibatches(32, samples)
    assert list(verdicts) == [8, 16, 64, 128]
    assert states(verdicts) == ["untested", "worse", "holds", "worse"]
    assert verdicts[8].text == "not tested: minibatch 16 does not hold; 0.04 points above"
    assert summary(32, verdicts) == "holds to 64, worse at 128"


def test_one_seed_gets_no_verdict():
    verdicts = judged(m64=ONE, m128=NONE)
    assert states(verdicts) == ["one seed", "one seed"]
    assert verdicts[64].text == "one seed: no std, so no verdict; give at least 2 seeds"
    assert verdicts[64].difference == pytest.approx(0)
    assert verdicts[128].text == "no run has ended, so no verdict"
    lone = judge_minibatches(32, {32: ONE, 64: HOLDS, 128: ONE, 256: NONE})
    assert set(states(lone)) == {"one seed"}
    assert lone[64].text == "one seed at the reference: no std, so no verdict; give at least 2 seeds"
    assert lone[128].text == "one seed: no std, so no verdict; give at least 2 seeds"
    assert lone[256].text == "no run has ended, so no verdict"
    assert judge_minibatches(32, {32: NONE, 64: HOLDS})[64].text == "no run has ended at the reference, so no verdict"
    assert [verdict.state for verdict in judge_arms([(ONE, REFERENCE), (WORSE, REFERENCE)])] == ["one seed", "worse"]


def test_runs_at_chance_are_judged_like_others():
    assert judged(m64=BROKEN)[64].text == "worse: 86.60 points, p = 0.004"
    one_broke = Sample.of([3.4, 3.5, 3.3, 90.0, 3.6])
    assert judged(m64=one_broke)[64].state == "undecided"
    assert judged(m64=one_broke)[64].more_seeds == 11
    broken_reference = judge_minibatches(32, {32: one_broke, 64: HOLDS})[64]
    assert broken_reference.state == "undecided"
    assert broken_reference.text == "undecided: -17.32 points, needs 10 more seeds"
    assert judge_minibatches(32, {32: BROKEN, 64: BROKEN})[64].text == "holds: at most 0.00 points above"


@given(st.floats(-0.5, 1.5), st.floats(0.05, 0.6), st.floats(0.05, 0.6), st.integers(2, 8))
def test_more_seeds_are_the_fewest_that_decide_by_welch(difference: float, one: float, other: float, n: int):
    a, b = Sample.known(3.5 + difference, one, n), Sample.known(3.5, other, n)
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
    assert (three.state, three.more_seeds, three.smallest_p) == ("undecided", 1, 0.05)
    assert three.out_of_reach


def test_what_a_hundred_seeds_do_not_decide_is_said_so():
    wild = Sample.known(3.75, 20.0, 5)
    verdict = judge_minibatches(1, {1: Sample.known(3.5, 20.0, 5), 2: wild})[2]
    assert verdict.more_seeds is None
    assert verdict.text == "undecided: 0.25 points, needs more than 100 more seeds"
    last = judge_minibatches(1, {1: Sample.known(3.5, 1.75, 5), 2: Sample.known(3.6, 1.75, 5)})[2]
    assert last.more_seeds == 100


def test_the_margin_is_the_users():
    samples = {32: REFERENCE, 64: UNDECIDED}
    assert [judge_minibatches(32, samples, margin)[64].state for margin in (0.5, 1.0)] == ["undecided", "holds"]
    assert judge_minibatches(32, {32: REFERENCE, 64: WORSE}, margin=2)[64].state == "holds"
    for judge in (lambda: judge_minibatches(32, samples, margin=0), lambda: judge_arms([], margin=-1)):
        with pytest.raises(ValueError, match="margin must be"):
            judge()


def test_the_reference_must_be_there():
    with pytest.raises(ValueError, match="reference 32 is not among the minibatches 64, 128"):
        judge_minibatches(32, {128: HOLDS, 64: HOLDS})
    assert judge_minibatches(32, {32: REFERENCE}) == {}


def test_arms_are_corrected_by_holm_in_both_families():
    arms = [WORSE, HOLDS, UNDECIDED, BROKEN]
    verdicts = judge_arms([(arm, REFERENCE) for arm in arms])
    assert [verdict.p for verdict in verdicts] == holm([p_worse(arm, REFERENCE) for arm in arms])
    assert [verdict.p_holds for verdict in verdicts] == holm([p_holds(arm, REFERENCE, 0.5) for arm in arms])
    assert [verdict.state for verdict in verdicts] == ["worse", "holds", "undecided", "worse"]
    assert verdicts[0].text == "worse: 1.10 points, p = 0.016 (Holm, 4 arms)"
    assert verdicts[1].text == "holds: 0.04 points above, p = 0.002 (Holm, 4 arms)"
    assert judge_arms([]) == []


def test_an_arm_alone_is_judged_as_a_minibatch_is():
    for sample in (HOLDS, WORSE, UNDECIDED, BROKEN):
        assert judge_arms([(sample, REFERENCE)]) == [judged(m64=sample)[64]]


@pytest.mark.parametrize(("arms", "state", "reach"), [(12, "worse", False), (13, "undecided", True)])
def test_five_seeds_are_too_few_for_more_than_twelve_arms(arms: int, state: str, reach: bool):
    verdict = judge_arms([(BROKEN, REFERENCE)] * arms)[0]
    assert (verdict.state, verdict.out_of_reach) == (state, reach)
    assert verdict.smallest_p == pytest.approx(arms / 252)
    if reach:
        said = "undecided: 86.60 points, needs 1 more seed; among 13 arms so few seeds cannot show worse"
        assert verdict.text == said


def test_one_more_seed_for_every_arm_is_what_the_count_means():
    five = [(Sample.of([4.4, 4.5, 4.6, 4.7, 4.8]), REFERENCE)] * 13
    assert {verdict.more_seeds for verdict in judge_arms(five)} == {1}
    six = [(Sample.of([4.4, 4.5, 4.6, 4.7, 4.8, 4.6]), Sample.of([3.4, 3.5, 3.3, 3.6, 3.2, 3.4]))] * 13
    assert {verdict.state for verdict in judge_arms(six)} == {"worse"}


def test_an_arm_with_one_seed_does_not_count_among_the_arms():
    verdicts = judge_arms([(ONE, REFERENCE), (WORSE, REFERENCE), (WORSE, NONE), (HOLDS, REFERENCE)])
    assert [verdict.family for verdict in verdicts] == [1, 2, 1, 2]
    assert [verdict.state for verdict in verdicts] == ["one seed", "worse", "one seed", "holds"]


def test_seeds_are_counted_for_all_arms_at_once():
    recipe = [Sample.known(3.5, 0.2, n) for n in range(5, 30)]
    arms = [(3.75, 0.2), (3.8, 0.2), (3.7, 0.3), (3.5, 0.7)]
    later = [judge_arms([(Sample.known(*arm, base.n), base) for arm in arms]) for base in recipe]
    for place, now in enumerate(later[0]):
        decided = [more for more, verdicts in enumerate(later) if verdicts[place].state != "undecided"]
        assert now.more_seeds == decided[0] > 1


@given(st.lists(st.tuples(st.floats(-1, 3), st.floats(0.05, 1)), min_size=2, max_size=6))
def test_company_never_helps_an_arm(arms: list[tuple[float, float]]):
    recipe = Sample.known(3.5, 0.2, 5)
    pairs = [(Sample.known(3.5 + difference, std, 5), recipe) for difference, std in arms]
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
        (Verdict("undecided", 0.41, more_seeds=1), "undecided: 0.41 points, needs 1 more seed"),
        (Verdict("undecided", -0.001, more_seeds=2), "undecided: 0.00 points, needs 2 more seeds"),
        (Verdict("untested", -0.2, why="minibatch 64 does not hold"), "not tested: minibatch 64 does not hold; 0.20"),
    ],
)
def test_words(verdict: Verdict, text: str):
    assert verdict.text.startswith(text)
    assert "\n" not in verdict.text


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ({}, "nothing above 32"),
        ({16: "holds"}, "nothing above 32"),
        ({64: "holds", 128: "holds"}, "holds to 128"),
        ({64: "undecided", 128: "untested"}, "undecided at 64"),
        ({64: "holds", 128: "one seed", 256: "untested"}, "holds to 64, one seed at 128"),
    ],
)
def test_a_summary_is_one_line(found: dict[int, Any], text: str):
    assert summary(32, {size: Verdict(state, 0.1) for size, state in found.items()}) == text


def test_a_verdict_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        judged(m64=HOLDS)[64].state = "worse"  # pyright: ignore[reportAttributeAccessIssue]

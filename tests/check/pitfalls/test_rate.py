"""Rates, warmups and schedules judged from recorded numbers alone."""

import math
from typing import Any

import pytest

from onehour.check.case import Base, Case, RateSchedule
from onehour.check.pitfalls import PITFALLS, judge, not_judged, rate, schedule
from onehour.check.story import Story
from onehour.check.tape import (
    BackwardPass,
    BatchGiven,
    EpochBegan,
    EpochEnded,
    LoaderSeen,
    OptimizerSeen,
    OptimizerStep,
    ParameterGroup,
    SchedulerCurve,
    SchedulerMade,
    SchedulerStep,
    Tape,
    Trouble,
)

BATCHES = 10


def tape(
    rates: list[float],
    *,
    adaptive: bool = False,
    scheduler: str | None = None,
    planned: int | None = 4,
    calls: int = 0,
    groups: list[float] | None = None,
    batches: int = BATCHES,
    restarts: bool = False,
) -> Tape:
    """Updates of 8 samples with these rates, `batches` an epoch.

    The scheduler is called `calls` times after each, once an epoch for -1. `groups` are groups' own rates.
    """
    tape = Tape()
    known = [ParameterGroup(momentum=0.9, parameters=2)] * len(groups or "1")
    kind = {"form": "outside", "velocity": [], "adaptive": adaptive, "decay": []}
    tape.add(OptimizerSeen("train.py:5", optimizer=0, groups=known, **kind))
    if scheduler:
        made = SchedulerMade("train.py:6", scheduler=0, name=scheduler, optimizer=0, parts=[], restarts=restarts)
        tape.add(made)
    tape.add(LoaderSeen("train.py:4", loader=0, samples=8 * batches, batches=batches, batch_size=8, drop_last=False))
    for index, now in enumerate(rates):
        epoch, batch = divmod(index, batches)
        if batch == 0:
            tape.add(EpochBegan("train.py:8", loader=0, epoch=epoch, batches=batches, planned=planned))
        tape.add(BatchGiven(loader=0, epoch=epoch, index=batch, size=8))
        tape.add(BackwardPass("train.py:9", terms=[], samples=8))
        tape.add(OptimizerStep("train.py:10", optimizer=0, rates=groups or [now]))
        for _ in range(max(calls, 0)):
            tape.add(SchedulerStep("train.py:11", scheduler=0))
        if batch == batches - 1:
            tape.add(EpochEnded(loader=0, epoch=epoch, cut=False, followed=True, trained=True))
            if calls < 0:
                tape.add(SchedulerStep("train.py:11", scheduler=0))
    return tape


def case(rates: list[float], base: Base | None = None, curve: list[list[float]] | None = None, **options: Any) -> Case:
    recorded = tape(rates, **options)
    if curve is not None:
        recorded.add(SchedulerCurve(scheduler=0, rates=curve))
    return Case([Story(recorded)], base)


def ids(*arguments: Any, **options: Any) -> list[str]:
    return [finding.pitfall for finding in judge(case(*arguments, **options))]


@pytest.mark.parametrize(
    ("lr", "minibatch", "expected"),
    [
        (0.1, 8, []),  # the base itself
        (0.1, 4, ["lr-not-scaled"]),
        (0.2, 4, ["no-warmup"]),  # right, but at once
        (0.2**0.5, 4, ["lr-scaled-wrong", "no-warmup"]),
        (0.1, 16, ["lr-not-scaled"]),
        (0.05, 16, []),
        (0.0505, 16, []),  # rounding is no finding
        (0.07, 16, ["lr-scaled-wrong"]),
        (0.0, 16, ["lr-scaled-wrong"]),  # as a division without a rest comes to
    ],
)
def test_the_linear_rule(lr: float, minibatch: int, expected: list[str]):
    assert ids([lr] * 20, Base(0.1, minibatch)) == expected


def test_without_a_base_no_rate_is_judged():
    assert ids([7.0] * 20) == []
    assert ids([7.0] * 20, Base(lr=0.1)) == ["no-warmup"]
    assert ids([7.0] * 20, Base(minibatch=4)) == []


def test_kn_counts_all_batches_of_an_update_and_all_processes():
    two = Case([Story(tape([0.2] * 20)), Story(tape([0.2] * 20))], Base(0.1, 8))
    assert two.minibatch == 16
    assert rate.lr_scaled_wrong(two) is rate.lr_not_scaled(two) is None
    assert case([0.1] * 20).minibatch == 8


def test_the_numbers_are_in_the_finding():
    finding = rate.lr_not_scaled(case([0.1] * 20, Base(0.1, 4)))
    assert finding is not None
    assert finding.measured == "target rate 0.1 at minibatch 8"
    assert finding.expected == "0.2 = 0.1 · 8 / 4"
    assert finding.where == "train.py:5"
    assert finding.section == "§2.1"


def test_the_target_is_the_schedule_s_highest_rate():
    curve = [[20, 0.1], [20, 0.2], [20, 0.02]]
    assert ids([0.1] * 20, Base(0.1, 4), curve, scheduler="LambdaLR", calls=1, planned=None) == []


@pytest.mark.parametrize(("lr", "expected"), [(0.2, ["adam-linear-scaling"]), (0.1414, []), (0.1, [])])
def test_an_adaptive_optimizer_is_not_scaled_linearly(lr: float, expected: list[str]):
    found = ids([lr] * 20, Base(0.1, 4), adaptive=True)
    assert [pitfall for pitfall in found if pitfall != "no-warmup"] == expected


def test_an_adaptive_rate_that_grows_with_the_processes():
    one, two = Story(tape([0.1] * 20, adaptive=True)), Story(tape([0.2] * 20, adaptive=True))
    finding = rate.adam_linear_scaling(Case([two, two], single=one))
    assert finding is not None
    assert finding.measured == "rate 0.1 on 1 process, 0.2 on 2"
    assert rate.adam_linear_scaling(Case([one, one], single=one)) is None
    assert rate.adam_linear_scaling(Case([two, two])) is None


@pytest.mark.parametrize(
    ("first", "expected"),
    [(0.8, "no-warmup"), (0.75, "no-warmup"), (0.1, None), (0.06, None), (0.0, "warmup-start"), (0.3, "warmup-start")],
)
def test_where_a_warmup_starts(first: float, expected: str | None):
    ramp = [first + (0.8 - first) * min(t / 15, 1) for t in range(20)]
    assert ids(ramp, Base(0.1, 1)) == ([expected] if expected else [])


def test_a_staircase_is_no_ramp():
    assert ids([0.1] * 10 + [0.2] * 10) == ["warmup-per-epoch"]
    assert ids([0.1] * 10 + [0.104] * 10) == []  # too small to be one
    assert ids([0.2] * 10 + [0.1] * 10) == []  # a drop
    assert ids([0.1] * 9 + [0.11] + [0.2] * 10) == []  # it moves within the epoch
    assert ids([0.1] * 10) == []  # one epoch says nothing


def cosine(steps: int, length: int) -> list[list[float]]:
    import math

    return [[1, 0.05 * (1 + math.cos(math.pi * t / length))] for t in range(steps + 1)]


def rates_of(curve: list[list[float]], a_update: int) -> list[float]:
    flat = [rate for count, rate in curve for _ in range(int(count))]
    return [flat[t * a_update] for t in range(20)]


def test_a_cosine_over_the_run_is_right():
    curve = cosine(40, 40)
    assert ids(rates_of(curve, 1), None, curve, scheduler="CosineAnnealingLR", calls=1) == []


def test_a_cosine_stepped_twice_at_each_update():
    curve = cosine(80, 40)
    found = ids(rates_of(curve, 2), None, curve, scheduler="CosineAnnealingLR", calls=2)
    assert found == ["scheduler-steps-k-times"]


@pytest.mark.parametrize(("length", "expected"), [(36, []), (18, ["scheduler-steps-k-times"])])
def test_shares_that_are_padded_are_no_other_schedule(length: int, expected: list[str]):
    """9 batches, of which two processes take 5 each, with two steps of the scheduler an update."""

    def run(length: int, calls: int, batches: int) -> Story:
        curve = cosine(40, length)
        recorded = tape(rates_of(curve, calls), scheduler="LambdaLR", calls=calls, batches=batches)
        recorded.add(SchedulerCurve(scheduler=0, rates=curve))
        return Story(recorded)

    two = run(length, 2, 5)
    found = judge(Case([two, two], single=run(36, 1, 9)), only=["scheduler-steps-k-times"])
    assert [finding.pitfall for finding in found] == expected


def test_a_cosine_planned_in_the_steps_that_are_taken():
    curve = cosine(80, 80)
    assert ids(rates_of(curve, 2), None, curve, scheduler="CosineAnnealingLR", calls=2) == []


def test_a_cosine_that_ends_too_early_and_rises_again():
    curve = cosine(40, 10)
    assert ids(rates_of(curve, 1), None, curve, scheduler="CosineAnnealingLR", calls=1) == ["lr-collapses"]
    (finding,) = judge(case(rates_of(curve, 1), None, curve, scheduler="CosineAnnealingLR", calls=1))
    assert "then up again" in finding.measured
    assert ids(rates_of(curve, 1), None, curve, scheduler="CosineAnnealingWarmRestarts", restarts=True, calls=1) == []
    assert ids(rates_of(curve, 1), None, curve, scheduler="CosineAnnealingLR", calls=1, planned=None) == []


@pytest.mark.parametrize("again", [0.1, 0.07])
def test_a_jump_back_to_the_peak_is_a_restart(again: float):
    """As Transformers' cosine with hard restarts, which is a LambdaLR."""
    curve = [[1, 0.05 * (1 + math.cos(math.pi * (step % 20) / 20))] for step in range(20)]
    curve += [[1, rate * again / 0.1] for _, rate in curve]
    found = ids(rates_of(curve, 1), None, curve, scheduler="LambdaLR", calls=1)
    assert found == ([] if again == 0.1 else ["lr-collapses"])


@pytest.mark.parametrize(("rise", "expected"), [(10, []), (4, ["lr-collapses"])])
def test_a_rise_like_the_first_is_a_cycle(rise: int, expected: list[str]):
    """A triangle by a LambdaLR is meant; a warmup, and a cosine that is stepped past its end, is not."""
    first = [[1, 0.1 * (0.05 + 0.95 * step / rise)] for step in range(rise)]
    cycle = [[1, 0.1 * (0.05 + 0.95 * abs(1 - step % 20 / 10))] for step in range(40 - rise)]
    curve = first + cycle
    assert ids(rates_of(curve, 1), None, curve, scheduler="LambdaLR", calls=1) == expected


def test_a_cosine_planned_in_iterations_and_stepped_by_epochs():
    curve = cosine(40, 40)
    seen = [curve[0][1]] * 10 + [curve[1][1]] * 10
    assert ids(seen, None, curve, scheduler="CosineAnnealingLR", calls=-1) == ["scheduler-too-slow"]


def test_drops_of_ten_are_no_collapse():
    drops = [[13, 0.1], [13, 0.01], [15, 0.001]]
    seen = [0.1] * 13 + [0.01] * 7
    assert ids(seen, None, drops, scheduler="MultiStepLR", calls=1) == []
    at_once = [[1, 0.1], [1, 0.01], [1, 0.001], [1, 1e-4], [1, 1e-5], [36, 1e-6]]
    seen = [0.1, 0.01, 0.001, 1e-4, 1e-5] + [1e-6] * 15
    assert ids(seen, None, at_once, scheduler="StepLR", calls=1) == ["lr-collapses"]


def test_a_curve_that_the_loop_does_not_follow_is_not_judged():
    curve = cosine(40, 10)
    assert case([0.1] * 20, None, curve, scheduler="CosineAnnealingLR", calls=1).schedule().curve == []
    assert ids([0.1] * 20, None, curve, scheduler="CosineAnnealingLR", calls=1) == []


def test_a_scheduler_that_is_never_stepped():
    assert ids([0.1] * 20, scheduler="StepLR") == ["scheduler-never-steps"]
    assert ids([0.1] * 20, scheduler="ReduceLROnPlateau") == []
    assert ids([0.1] * 10, scheduler="StepLR") == []  # one epoch
    assert ids([0.1] * 15 + [0.05] * 5, scheduler="StepLR") == []  # someone else sets it


def test_the_end_of_a_schedule():
    assert schedule.horizon(RateSchedule(seen=[], steps=40, curve=cosine(40, 40))) == 40
    assert schedule.horizon(RateSchedule(seen=[], steps=100, curve=[[50, 0.1]])) == 49  # it refused to go on
    assert schedule.horizon(RateSchedule(seen=[], steps=40, curve=[[41, 0.1]])) is None
    assert schedule.horizon(RateSchedule(seen=[], steps=None, curve=cosine(40, 40))) is None


@pytest.mark.parametrize(
    ("rates", "rising"),
    [
        ([0.1] * 20, False),
        ([0.1] * 10 + [0.2] * 10, True),  # by epochs
        ([0.1 + 0.01 * t for t in range(20)], True),
        ([0.1 + 0.01 * min(t, 10) for t in range(20)], False),
        ([0.2] * 10 + [0.1] * 10, False),
        ([0.1] * 3 + [0.2] * 3 + [0.3] * 14, False),
        ([0.0, 0.1, 0.2], True),
    ],
)
def test_whether_the_rate_still_rises(rates: list[float], rising: bool):
    assert case(rates).schedule().rising == rising
    assert (case(rates).schedule().target is None) == rising


def test_a_rate_that_still_rises_is_not_judged_and_that_is_said():
    ramp = [0.1 + 0.01 * t for t in range(20)]
    assert ids(ramp, Base(0.1, 1)) == []
    said, *others = not_judged(case(ramp, Base(0.1, 1)))
    assert "it still rises after 20 updates" in said
    assert not_judged(case(ramp)) == not_judged(case([0.1] * 20, Base(0.1, 1))) == others
    assert ids([0.01 * t for t in range(40)], Base(0.1, 1)) == ["warmup-start"]  # where it began is known


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.1, 1.0], []),  # the body's is the base's, at the base's minibatch
        ([0.01, 0.1], []),  # the head's is
        ([0.3, 1.0], ["lr-scaled-wrong"]),  # neither
        ([0.0, 0.1], []),  # a body that does not learn
    ],
)
@pytest.mark.parametrize("curve", [False, True])
def test_of_groups_with_rates_of_their_own_the_one_that_fits_is_judged(
    rates: list[float], expected: list[str], curve: bool
):
    options: dict[str, Any] = {"scheduler": "LambdaLR", "calls": 1, "curve": [[40, max(rates)]]} if curve else {}
    judged = case([0.1] * 20, Base(0.1, 8), groups=rates, **options)
    found = [finding for finding in judge(judged) if finding.pitfall != "no-warmup"]
    assert [finding.pitfall for finding in found] == expected
    assert all("target rate 1 " in finding.measured for finding in found)


def test_a_group_at_the_base_s_own_rate_is_not_scaled():
    judged = case([0.1] * 20, Base(0.1, 4), groups=[0.1, 1.0])
    assert [finding.pitfall for finding in judge(judged)] == ["lr-not-scaled"]


def test_an_adaptive_head_s_rate_is_no_linear_scaling_of_the_body_s():
    judged = case([0.1] * 20, Base(0.1, 4), groups=[0.1, 0.2], adaptive=True)
    assert judge(judged) == []


def test_what_was_asked_for_and_cannot_be_judged_of_one_process_is_said():
    one = case([0.1] * 8)
    for asked, said in {
        "overlapping-shards": "overlapping-shards: what shows only on several processes was not judged",
        "decay-decoupled-scales-with-lr": "rates were not judged: that needs --base-lr and --base-minibatch",
        "adam-linear-scaling": "rates were not judged: that needs --base-lr and --base-minibatch",
        "batchnorm-n-changed": "BatchNorm's n was not judged: that needs --base-per-worker",
    }.items():
        notes = [note for note in not_judged(one, [asked]) if asked in note.pitfalls]
        assert said in notes
    assert not [note for note in not_judged(one, PITFALLS) if "several processes" in note], "of all, what one can have"


def test_a_part_of_the_check_that_failed_is_said_once():
    recorded = tape([0.1] * 8)
    recorded.events += [Trouble(observer="Loaders._began", error="TypeError: int() …")] * 2
    notes = [note for note in not_judged(Case([Story(recorded)])) if "a part of the check failed" in note]
    assert len(notes) == 1
    assert "Loaders._began: TypeError" in notes[0]

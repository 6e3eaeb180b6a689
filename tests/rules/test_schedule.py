"""§2.2 and §5.1: the rate as a pure function of the fractional epoch."""

import itertools
import math
import pickle
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onehour.config import Recipe
from onehour.rules.minibatch import Minibatch, sqrt_scaling
from onehour.rules.schedule import (
    Schedule,
    constant_warmup,
    cosine_decay,
    gradual_warmup,
    parse_milestones,
    scaled_step_schedule,
    step_decay,
)

SAMPLES, KN = 1_281_167, 8192
T = 5 * SAMPLES / KN  # 781.96 iterations of warmup


def paper(milestones=(30, 60, 80)):
    return gradual_warmup(step_decay(3.2, milestones), start_lr=0.1, epochs=5)


def at(schedule, iteration: int) -> float:
    return schedule(iteration * KN / SAMPLES)


# By hand: η_t = 0.1 + 3.1·t/T below T = 781.96; drops at t = 4691.8, 9383.5 and 12511.4.
GOLDEN = [
    *((0, 0.1), (1, 0.10396438559532052), (100, 0.4964385595320516), (781, 3.196185149945323), (782, 3.2)),
    *((4691, 3.2), (4692, 0.32), (9383, 0.32), (9384, 0.032), (12511, 0.032), (12512, 0.0032), (14075, 0.0032)),
]


@pytest.mark.parametrize("kn", [None, 8192, Minibatch(per_worker=32, workers=256)], ids=["parts", "whole", "k and n"])
def test_the_papers_8k_recipe_has_these_rates(kn: Any):
    schedule = paper() if kn is None else scaled(minibatch=kn)
    rates = [at(schedule, iteration) for iteration, _ in GOLDEN]
    assert rates == pytest.approx([rate for _, rate in GOLDEN], rel=0, abs=1e-12)


def test_gradual_warmup_adds_the_same_amount_at_every_iteration():
    rates = [at(paper(), t) for t in range(782)]
    assert all(abs(b - a - 3.1 / T) < 1e-12 for a, b in itertools.pairwise(rates))
    assert round(rates[1] - rates[0], 3) == 0.004  # the paper's "about +0.004 an iteration"


def test_a_staircase_of_whole_epochs_is_another_warmup():
    """Setting the rate once an epoch gives five rates and is 0.6 too low at the end of each epoch."""
    every_iteration = [at(paper(), t) for t in range(782)]
    staircase = [paper()(math.floor(t * KN / SAMPLES)) for t in range(782)]
    assert len(set(every_iteration)) == 782
    assert len(set(staircase)) == 5
    assert max(a - b for a, b in zip(every_iteration, staircase, strict=True)) > 0.6


def test_gradual_warmup_starts_at_the_base_rate_and_meets_the_schedule_without_a_jump():
    schedule = gradual_warmup(cosine_decay(3.2, 90), start_lr=0.1, epochs=5)
    assert schedule(0) == 0.1
    assert schedule(math.nextafter(5, 0)) == pytest.approx(schedule(5), rel=1e-12)
    assert schedule(5) == cosine_decay(3.2, 90)(5)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (
            constant_warmup(step_decay(3.2, [30]), start_lr=0.1, epochs=5),
            {0: 0.1, 2.5: 0.1, math.nextafter(5, 0): 0.1, 5: 3.2},
        ),
        (cosine_decay(3.2, 90), {0: 3.2, 30: 2.4, 45: 1.6, 60: 0.8, 90: 0, 91: 0}),
        (step_decay(2.0, ["64/3", 30.5], factor=0.5), {0: 2, 21.3: 2, 21.4: 1, 30.4: 1, 30.5: 0.5, 1e9: 0.5}),
        (step_decay(0.1, []), {0: 0.1, 1e9: 0.1}),
    ],
    ids=["constant warmup", "half a cosine, then zero", "steps", "no milestones"],
)
def test_a_schedule_has_these_rates_at_these_epochs(schedule: Schedule, rates: dict[float, float]):
    assert [schedule(epoch) for epoch in rates] == pytest.approx([*rates.values()], rel=0, abs=1e-12)


MADE = [
    (step_decay(3.2, ["64/3", 30]), "StepDecay(lr=3.2, milestones=(21.333333333333332, 30.0), factor=0.1)"),
    (cosine_decay(3.2, 90), "CosineDecay(lr=3.2, epochs=90)"),
    (
        gradual_warmup(cosine_decay(3.2, 90), start_lr=0.1, epochs=5),
        "GradualWarmup(schedule=CosineDecay(lr=3.2, epochs=90), start_lr=0.1, epochs=5)",
    ),
    (
        constant_warmup(step_decay(3.2, []), start_lr=0.1, epochs=5),
        "ConstantWarmup(schedule=StepDecay(lr=3.2, milestones=(), factor=0.1), start_lr=0.1, epochs=5)",
    ),
]


@pytest.mark.parametrize(("schedule", "shown"), MADE, ids=[type(schedule).__name__ for schedule, _ in MADE])
def test_a_schedule_is_a_value_that_prints_pickles_and_compares(schedule, shown):
    again = pickle.loads(pickle.dumps(schedule))
    assert repr(again) == repr(schedule) == shown
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert [again(epoch / 7) for epoch in range(630)] == [schedule(epoch / 7) for epoch in range(630)]


def test_schedules_of_other_numbers_or_kinds_differ():
    warmups = [make(step_decay(3.2, [30]), lr, 5) for make in (gradual_warmup, constant_warmup) for lr in (0, 0.1)]
    made = [*(schedule for schedule, _ in MADE), step_decay(3.2, [30]), step_decay(3.2, [30], 0.2), *warmups]
    assert len(set(made)) == len(made)


PAPERS = {"base_lr": 0.1, "base_minibatch": 256, "minibatch": 8192, "milestones": [30, 60, 80], "warmup_epochs": 5}


def scaled(**changes: Any) -> Schedule:
    """The paper's whole schedule at 8k, but for what is changed."""
    return scaled_step_schedule(**PAPERS | changes)


@pytest.mark.parametrize("kn", [257, 512, 8192])
def test_the_whole_schedule_is_its_equations(kn):
    schedule = scaled(minibatch=kn)
    target = 0.1 * kn / 256
    for t in range(0, 90 * SAMPLES // kn, 97):
        epoch = t * kn / SAMPLES
        passed = sum(t * kn >= milestone * SAMPLES for milestone in (30, 60, 80))
        expected = 0.1 + (target - 0.1) * t * kn / (5 * SAMPLES) if epoch < 5 else target * 0.1**passed
        assert schedule(epoch) == pytest.approx(expected, rel=0, abs=1e-12)


@pytest.mark.parametrize("kn", [64, 256, 257, 8192])
@pytest.mark.parametrize("epochs", [0, 5])
def test_the_whole_schedule_is_the_recipes(kn, epochs):
    sizes: dict[str, Any] = {"minibatch": kn, "warmup_epochs": epochs}
    assert Recipe(per_worker=1, **sizes).schedule == scaled(**sizes)


@pytest.mark.parametrize("kn", [64, 256])
def test_the_whole_schedule_warms_up_only_where_the_minibatch_grew(kn):
    schedule = scaled(minibatch=kn)
    assert [schedule(epoch) for epoch in (0, 2.5, 5)] == [0.1 * kn / 256] * 3


def test_wrong_wholes_differ():
    """Scaled by the square root, the base rate left alone, the warmup put before the milestones, or none."""
    right = scaled()
    root = gradual_warmup(step_decay(sqrt_scaling(0.1, 256, 8192), [30, 60, 80]), start_lr=0.1, epochs=5)
    unscaled = scaled(base_minibatch=8192)
    delayed = scaled(milestones=[35, 65, 85])
    cold = scaled(warmup_epochs=0)
    for wrong in (root, unscaled, delayed, cold):
        assert max(abs(right(epoch / 4) - wrong(epoch / 4)) for epoch in range(360)) > 2


@settings(max_examples=300)
@given(
    samples=st.integers(1, 2**31),
    kn=st.integers(1, 2**20),
    milestone=st.fractions(Fraction(1, 1000), 1000, max_denominator=1000),
    offset=st.integers(-1, 1),
)
def test_a_drop_comes_at_the_iteration_that_whole_numbers_say(samples, kn, milestone, offset):
    """s/N and a/b differ by 1/(N·b) or not at all: 4e-13 here, and floats below 1000 are 1.2e-13 apart."""
    iteration = max(0, math.ceil(milestone * samples / kn) + offset)
    passed = iteration * kn * milestone.denominator >= milestone.numerator * samples
    assert step_decay(1.0, [milestone], 0.5)(iteration * kn / samples) == (0.5 if passed else 1.0)


@pytest.mark.parametrize(("iteration", "rate"), [(63, 1.0), (64, 0.5), (65, 0.5)])
def test_a_drop_at_64_thirds_comes_exactly_there(iteration, rate):
    """Iteration 64 of kn = N/3 starts at epoch 64/3 exactly, which no decimal fraction can say."""
    assert step_decay(1.0, ["64/3"], 0.5)(iteration * 2731 / 8193) == rate


@pytest.mark.parametrize(
    ("written", "parsed"),
    [
        (["64/3"], [Fraction(64, 3)]),
        ([8, 16.5, "21.25", " 30 "], [8, Fraction(33, 2), Fraction(85, 4), 30]),
        ((Fraction(1, 3),), [Fraction(1, 3)]),
        ([], []),
    ],
)
def test_milestones_are_read_as_exact_fractions(written, parsed):
    assert parse_milestones(written) == parsed


@pytest.mark.parametrize(
    "milestones",
    [
        *([60, 30], [30, 30], [0], [-1, 30], ["x"], [""], ["1/0"], [math.nan], [math.inf], [None], [[30]], [1, "2/2"]),
        "36",  # letter by letter it would drop at epochs 3 and 6
    ],
)
def test_milestones_that_are_no_increasing_epochs_are_refused(milestones):
    with pytest.raises(ValueError, match="milestone"):
        parse_milestones(milestones)

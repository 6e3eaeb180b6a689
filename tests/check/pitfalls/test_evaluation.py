"""The number that a loop makes of an evaluation, judged from the counts of its batches."""

import pytest

from onehour.check.case import Case
from onehour.check.pitfalls import judge
from onehour.check.story import Story
from onehour.check.tape import EpochEnded, Tape, ValueSeen

COUNTS = [(14, 16), (8, 16), (4, 8)]  # 26 of 40: 65 %; the mean of the rates is 62.5 %


def story(counts: list[tuple[int, int]], *values: float, name: str = "main:accuracy") -> Story:
    tape = Tape()
    for value in values:
        tape.add(ValueSeen("train.py:20", loader=1, name=name, value=value))
    tape.add(EpochEnded(loader=1, trained=False, batches=len(counts), counts=[list(c) for c in counts]))
    return Story(tape)


def said(*stories: Story) -> list[tuple[str, str]]:
    return [(finding.measured, finding.expected) for finding in judge(Case(list(stories)))]


@pytest.mark.parametrize(
    ("value", "right", "hits"),
    [(0.625, "0.65", 26), (62.5, "65", 26), (0.375, "0.35", 14), (37.5, "35", 14)],
)
def test_a_mean_of_rates_in_every_unit(value: float, right: str, hits: int):
    ((measured, expected),) = said(story(COUNTS, 0.5, value))
    assert (
        measured
        == f"accuracy: {value:g} is the mean of the batches' rates; one of 8 samples weighs as much as one of 16"
    )
    assert expected == f"{right}, of {hits} in 40 on what was evaluated here"


@pytest.mark.parametrize("value", [0.65, 65.0, 0.35, 35.0, 0.75, 0.6251])
def test_other_numbers_are_none(value: float):
    assert said(story(COUNTS, value)) == []


def test_a_batch_s_own_rate_may_be_the_mean_by_chance():
    assert said(story([(2, 16), (1, 16), (0, 8)], 6.25, name="update:self.val")) == []


def test_equal_batches_have_one_mean():
    assert said(story([(12, 16), (10, 16)], 0.6875)) == []


def test_a_value_without_a_name_is_said_alone():
    ((measured, _),) = said(story(COUNTS, 0.625, name="line 20 0"))
    assert measured.startswith("0.625 is the mean")


def test_a_mean_over_processes():
    first, second = [(12, 16), (4, 16)], [(4, 8), (8, 8)]  # 16 of 32 and 12 of 16: 0.5 and 0.75
    ((measured, expected),) = said(story(first, 0.625), story(second, 0.625))
    assert "0.625 is the mean of the processes' rates; one of 16 samples weighs as much as one of 32" in measured
    assert expected.startswith("0.583333, of 28 in 48")
    assert said(story(first, 28 / 48), story(second, 28 / 48)) == []

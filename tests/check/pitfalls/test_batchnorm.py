"""Whose running statistics are evaluated or saved, judged from those of two processes."""

from typing import Any

import pytest

from onehour.check.case import Base, Case
from onehour.check.pitfalls import judge
from onehour.check.story import Story
from onehour.check.tape import BatchNormSizes, ModelWrapped, RunningStatistics, Tape

OWN = ([1.0, 0.0], [0.0, 1.0])
MEAN = [0.5, 0.5]


def found(
    used: tuple[Any, Any], *, own: Any = OWN, broadcast: bool | None = None, when: str = "evaluation", at: int = 3
) -> dict[str, str]:
    stories = []
    for rank in range(2):
        tape = Tape()
        if broadcast is not None:
            tape.add(ModelWrapped("train.py:4", broadcast=broadcast))
        for update in range(1, 4):
            tape.add(RunningStatistics(updates=update, numbers=own[rank]))
        if used[rank] is not None:
            tape.add(RunningStatistics("train.py:9", when, updates=at, numbers=used[rank], values=used[rank]))
        stories.append(Story(tape))
    return {finding.pitfall: finding.measured for finding in judge(Case(stories))}


@pytest.mark.parametrize(
    ("used", "broadcast", "expected"),
    [
        ((MEAN, MEAN), None, []),
        ((MEAN, MEAN), False, []),
        (OWN, False, ["batchnorm-stats-diverge"]),
        (OWN, None, ["batchnorm-stats-diverge"]),
        ((MEAN, MEAN), True, ["batchnorm-stats-of-rank-0"]),  # averaged, but what is averaged was process 0's
        ((OWN[0], None), False, ["batchnorm-stats-of-rank-0"]),  # one process evaluates, with its own
        ((MEAN, None), False, []),  # one process evaluates what was averaged
    ],
)
def test_whose_statistics(used: Any, broadcast: bool | None, expected: list[str]):
    assert list(found(used, broadcast=broadcast)) == expected
    assert list(found(used, broadcast=broadcast, when="save")) == expected


def test_the_distance_is_that_of_the_running_means():
    said = found(([3.0, 4.0], [3.0, 4.5]))["batchnorm-stats-diverge"]
    assert said == "at the evaluation the processes' running means differ by 10 %"


def test_statistics_that_never_differ_are_nobody_s():
    assert found((MEAN, None), own=(MEAN, MEAN), broadcast=True) == {}


def test_without_the_processes_own_nothing_is_claimed():
    assert found(OWN, at=7) == {}


def test_n_against_the_base_and_the_other_run():
    def story(n: int) -> Story:
        tape = Tape()
        tape.add(BatchNormSizes(sizes=[4, n]))
        return Story(tape)

    def said(*stories: Story, **options: Any) -> list[str]:
        return [finding.measured for finding in judge(Case(list(stories), **options))]

    assert said(story(64), base=Base(per_worker=32)) == ["BatchNorm normalises over n = 64 samples"]
    assert said(story(32), base=Base(per_worker=32)) == []
    assert said(story(16), story(16), single=story(32)) == ["n = 32 on 1 process, 16 on 2"]
    assert said(story(32), story(32), single=story(32)) == []

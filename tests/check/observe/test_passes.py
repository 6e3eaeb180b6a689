"""A pass may be cut, come in the middle of another, or be too long for a run: what is judged stays the same."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from observing import HEAD, Watched
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import check_matrix as matrix
from onehour.check.observe.passes import cut_to
from onehour.check.run.checking import Checked
from onehour.check.run.forkserver import ForkServer
from onehour.check.tape import BatchGiven, EpochEnded

Run = Callable[[str], Checked]
EARLY = """import sys
p = sys.modules["onehour.check.observe.passes"]
p.WHOLE, p.UNCUT_SECONDS, p.HEAD_UPDATES, p.EVALUATION_BATCHES = 4, 0.0, 2, 1
"""
"""In a script: no pass is too short to be cut."""
EVALUATED = """
held_out = DataLoader(TensorDataset(torch.randn(50, 4), torch.randint(0, 3, (50,))), batch_size=16, drop_last=True)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)

def evaluate():
    right = n = 0
    with torch.no_grad():
        for x, y in held_out:
            right += (model(x).argmax(1) == y).sum().item()
            n += len(y)
    return right / n

"""


def long(batches: int) -> str:
    return HEAD.replace("64", str(8 * batches)) + EVALUATED


def ids(checked: Checked) -> list[str]:
    return sorted(finding.pitfall for finding in checked.findings)


PAIRS = list({loop.text: loop for loop in matrix.loops() if loop.framework is None and loop.kind != "right"}.values())
TAKEN = {
    "by next": ("    batches = iter(loader)\n    for i in range(len(loader)):\n        learn(*next(batches))", False),
    "by a generator": (
        "    batches = (batch for batch in loader)\n    for i in range(len(loader)):\n        learn(*next(batches))",
        False,
    ),
    "by for": ("    for x, y in loader:\n        learn(x, y)", True),
    "by enumerate": ("    for i, (x, y) in enumerate(loader):\n        learn(x, y)", True),
    "by zip": ("    for (x, y), i in zip(loader, range(100)):\n        learn(x, y)", True),
}


@pytest.mark.parametrize("way", TAKEN)
def test_a_pass_is_cut_only_where_a_loop_can_bear_it(way: str, checked: Run):
    body, cut = TAKEN[way]
    result = checked(f"{EARLY}{long(16)}for epoch in range(9):\n{body}\n    scheduler.step()\n")
    (story,) = result.stories
    assert [end.cut for end in story.ends(0)] == [cut, cut]
    given = Counter(event.epoch for event in story.tape.of(BatchGiven))
    assert all((given[end.epoch] < 16) == cut for end in story.ends(0))
    assert ids(result) == []


EVALUATED_WHEN = {
    "every third step": "        if step % 3 == 0:\n            evaluate()",
    "every epoch": "        if step % 8 == 0:\n            evaluate()",
    "at the last batch": "        if i == 7:\n            evaluate()",
    "twice": "        if i in (0, 6):\n            evaluate()",
    "by next": """        if i % 3 == 0:
            batches = iter(held_out)
            with torch.no_grad():
                for _ in range(len(held_out)):
                    x, y = next(batches)
                    model(x).argmax(1)""",
}


@pytest.mark.parametrize("when", EVALUATED_WHEN)
def test_an_evaluation_within_an_epoch_hides_nothing(when: str, checked: Run):
    loop = f"""
step = 0
for epoch in range(10):
    for i, (x, y) in enumerate(loader):
        learn(x, y)
        step += 1
{EVALUATED_WHEN[when]}
"""
    result = checked(HEAD + EVALUATED + loop)
    assert ids(result) == ["dropped-evaluation", "scheduler-never-steps"]
    assert len(result.stories[0].trained()) == 2
    assert not any(end.trained for end in result.stories[0].ends(1))


@pytest.mark.parametrize("batches", [140, 200, 310])
def test_a_fast_loop_of_long_epochs_is_judged_in_full(batches: int, checked: Run):
    loop = "for epoch in range(10):\n    for x, y in loader:\n        learn(x, y)\n"
    result = checked(long(batches).replace("shuffle=True", "shuffle=False") + loop)
    assert ids(result) == ["same-order-every-epoch", "scheduler-never-steps"]
    assert result.notes == []


def test_epochs_that_were_not_seen_are_said(checked: Run):
    result = checked(HEAD + EVALUATED + "for x, y in loader:\n    learn(x, y)\n")
    assert ids(result) == []
    assert result.notes == [
        "1 whole epoch of the training data was seen: what shows only between two was not judged",
    ]


def test_a_pass_leaps_where_the_updates_that_are_left_do_not_suffice():
    common: dict[str, Any] = {"total": 400, "at": 4, "taken": 4, "updates": 4, "seconds": 0.01}
    assert cut_to(**common, left=1000) is None
    assert cut_to(**common, left=400) == cut_to(**common, left=100) == 398
    common["updates"] = None
    assert cut_to(**common, left=0) is None  # an evaluation makes none


def test_optimizers_that_take_turns_make_one_update():
    watched, counted = Watched(), []
    with watched:
        first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
        for optimizer in (first, second, first, second, first, first, second):
            optimizer.step()
            counted.append(watched.recorder.updates)
    assert counted == [1, 1, 2, 2, 3, 4, 4]


def test_two_loaders_at_once_are_both_seen_to_their_ends():
    with Watched() as tape:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        one, other = (DataLoader(TensorDataset(torch.ones(6, 1)), batch_size=2) for _ in range(2))
        for _ in range(2):
            for (x,), (y,) in zip(one, other, strict=True):
                model(x + y).sum().backward()
                optimizer.step()
    ends = [(e.loader, e.epoch, e.trained) for e in tape.of(EpochEnded)]
    assert sorted(ends) == [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, True)]


@pytest.mark.slow
@pytest.mark.parametrize("loop", PAIRS, ids=lambda loop: loop.stem)
def test_a_cut_changes_no_finding(loop: matrix.Loop, forkserver: ForkServer):
    """Every plain pair again, its passes cut as early as can be."""
    hasty = replace(loop, text=loop.text.replace("\n", f"\n{EARLY}", 1))
    came = matrix.outcome(hasty, forkserver)
    assert [finding.pitfall for finding in came.findings] == loop.expected, came.findings

"""Schedulers that a loop steps late, or in turns, are none that are forgotten."""

from collections.abc import Callable

import pytest
from observing import HEAD

from onehour.check.run.checking import Checked

SCHEDULERS = "from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, StepLR\n"
SCHEDULERS += "from torch.optim.swa_utils import SWALR\n"
PASS = "for epoch in range(100):\n    for x, y in loader:\n        learn(x, y)\n"
NAMED = "plan = StepLR(\n    optimizer,\n    30,\n)\n"
RIGHT = {
    "averages later": (
        "plan = MultiStepLR(optimizer, [30, 60])\nlast = SWALR(optimizer, swa_lr=0.05)\n"
        + PASS
        + "    if epoch > 75:\n        last.step()\n    else:\n        plan.step()\n",
        0,
    ),
    "averages only": ("last = SWALR(optimizer, swa_lr=0.05)\n" + PASS, 0),
    "falls later": (NAMED + PASS + "    if epoch >= 5:\n        plan.step()\n", 1),
    "in a function": (
        NAMED + "def fall(scheduler):\n    scheduler.step()\n" + PASS + "    if epoch >= 5:\n        fall(plan)\n",
        1,
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_scheduler_that_is_stepped_later_is_no_finding(name: str, checked: Callable[[str], Checked]):
    loop, notes = RIGHT[name]
    result = checked(HEAD + SCHEDULERS + loop)
    assert result.findings == []
    said = "StepLR was not stepped in 2 epochs; the loop steps it later, which was not judged"
    assert result.notes == [said] * notes


@pytest.mark.parametrize("made", [NAMED, "plan, other = StepLR(optimizer, 30), 1\n", "StepLR(optimizer, 30)\n"])
def test_a_scheduler_that_nobody_steps_is_one(made: str, found: Callable[[str], list[str]]):
    assert found(HEAD + SCHEDULERS + made + PASS) == ["scheduler-never-steps"]


def test_steps_that_are_counted_are_not_taken_for_epochs(found: Callable[[str], list[str]]):
    loop = """
scheduler = CosineAnnealingLR(optimizer, T_max=2000)
def cycle(loader):
    while True:
        for batch in loader:
            yield batch
batches = cycle(loader)
for step in range(2000):
    learn(*next(batches))
    scheduler.step()
"""
    assert found(HEAD + SCHEDULERS + loop) == []

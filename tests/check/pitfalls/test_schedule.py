"""Schedulers that a loop steps late, or in turns, are none that are forgotten."""

from pathlib import Path

import pytest

from onehour.check.run.checking import Checked, check_script
from onehour.check.run.forkserver import ForkServer

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, StepLR
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.randn(64, 4), torch.randint(0, 3, (64,)))
loader = DataLoader(data, batch_size=8, shuffle=True)
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

def learn(x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

"""
PASS = "for epoch in range(100):\n    for x, y in loader:\n        learn(x, y)\n"
NAMED = "plan = StepLR(\n    optimizer,\n    30,\n)\n"


def checked(forkserver: ForkServer, folder: Path, loop: str) -> Checked:
    path = folder / "train.py"
    path.write_text(HEAD + loop, encoding="utf-8")
    return check_script(path, forkserver=forkserver, limit=60, cwd=folder)


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
def test_a_scheduler_that_is_stepped_later_is_no_finding(name: str, forkserver: ForkServer, tmp_path: Path):
    loop, notes = RIGHT[name]
    result = checked(forkserver, tmp_path, loop)
    assert result.findings == []
    said = "StepLR was not stepped in 2 epochs; the loop steps it later, which was not judged"
    assert result.notes == [said] * notes


@pytest.mark.parametrize("made", [NAMED, "plan, other = StepLR(optimizer, 30), 1\n", "StepLR(optimizer, 30)\n"])
def test_a_scheduler_that_nobody_steps_is_one(made: str, forkserver: ForkServer, tmp_path: Path):
    assert [finding.pitfall for finding in checked(forkserver, tmp_path, made + PASS).findings] == [
        "scheduler-never-steps"
    ]


def test_steps_that_are_counted_are_not_taken_for_epochs(forkserver: ForkServer, tmp_path: Path):
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
    assert checked(forkserver, tmp_path, loop).findings == []

"""A pass may be cut, come in the middle of another, or be too long for a run: what is judged stays the same."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import check_matrix as matrix
from onehour.check.observe import Observers
from onehour.check.observe.passes import cut_to
from onehour.check.observe.recorder import TapeRecorder
from onehour.check.run.checking import Checked, check_script
from onehour.check.run.forkserver import ForkServer
from onehour.check.tape import BatchGiven, EpochEnded

EARLY = """import onehour.check.observe.passes as p
p.WHOLE, p.UNCUT_SECONDS, p.HEAD_UPDATES, p.EVALUATION_BATCHES = 4, 0.0, 2, 1
"""
"""A module that the process with torch imports before any script: no pass is too short to be cut."""
HEAD = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.randn({samples}, 4), torch.randint(0, 3, ({samples},)))
loader = DataLoader(data, batch_size=8, shuffle={shuffle})
held_out = DataLoader(TensorDataset(torch.randn(50, 4), torch.randint(0, 3, (50,))), batch_size=16, drop_last=True)
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.{scheduler}

def learn(x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

def evaluate():
    right = n = 0
    with torch.no_grad():
        for x, y in held_out:
            right += (model(x).argmax(1) == y).sum().item()
            n += len(y)
    return right / n

"""


def checked(
    forkserver: ForkServer, folder: Path, loop: str, samples: int = 64, shuffle: bool = True, scheduler: str = ""
) -> Checked:
    head = HEAD.format(samples=samples, shuffle=shuffle, scheduler=scheduler or "StepLR(optimizer, 3)")
    path = folder / "train.py"
    path.write_text(head + loop, encoding="utf-8")
    return check_script(path, forkserver=forkserver, limit=60, cwd=folder)


def found(checked: Checked) -> list[str]:
    return sorted(finding.pitfall for finding in checked.findings)


PAIRS = [loop for loop in matrix.loops() if loop.framework is None and loop.kind != "right"]


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    folder = tmp_path_factory.mktemp("hasty")
    (folder / "cut_early_too.py").write_text(EARLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        with ForkServer(preload=["cut_early_too"]) as forkserver:
            yield forkserver


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
def test_a_pass_is_cut_only_where_a_loop_can_bear_it(way: str, hasty: ForkServer, tmp_path: Path):
    body, cut = TAKEN[way]
    result = checked(hasty, tmp_path, f"for epoch in range(9):\n{body}\n    scheduler.step()\n", 128)
    assert [end.cut for end in result.stories[0].ends(0)] == [cut, cut]
    assert found(result) == []


@pytest.mark.parametrize("when", ["if step % 3 == 0:", "if step % 8 == 0:", "if i == 7:", "if i in (0, 6):"])
def test_an_evaluation_within_an_epoch_hides_nothing(when: str, forkserver: ForkServer, tmp_path: Path):
    loop = f"""
step = 0
for epoch in range(10):
    for i, (x, y) in enumerate(loader):
        learn(x, y)
        step += 1
        {when}
            evaluate()
"""
    result = checked(forkserver, tmp_path, loop)
    assert found(result) == ["dropped-evaluation", "scheduler-never-steps"]
    assert len(result.stories[0].trained()) == 2
    assert not any(end.trained for end in result.stories[0].ends(1))


def test_an_evaluation_by_next_within_an_epoch_is_none_of_training(forkserver: ForkServer, tmp_path: Path):
    loop = """
for epoch in range(10):
    for i, (x, y) in enumerate(loader):
        learn(x, y)
        if i % 3 == 0:
            batches = iter(held_out)
            with torch.no_grad():
                for _ in range(len(held_out)):
                    x, y = next(batches)
                    model(x).argmax(1)
"""
    result = checked(forkserver, tmp_path, loop)
    assert found(result) == ["dropped-evaluation", "scheduler-never-steps"]
    assert not any(end.trained for end in result.stories[0].ends(1))


def test_a_fast_loop_of_long_epochs_is_judged_in_full(forkserver: ForkServer, tmp_path: Path):
    for batches in (140, 200, 310):
        loop = "for epoch in range(10):\n    for x, y in loader:\n        learn(x, y)\n"
        result = checked(forkserver, tmp_path, loop, 8 * batches, shuffle=False)
        assert found(result) == ["same-order-every-epoch", "scheduler-never-steps"]
        assert result.notes == []


def test_epochs_that_were_not_seen_are_said(forkserver: ForkServer, tmp_path: Path):
    result = checked(forkserver, tmp_path, "for x, y in loader:\n    learn(x, y)\n")
    assert found(result) == []
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
    recorder = TapeRecorder(deep_updates=64, cut=False)
    observers = Observers(recorder)
    observers.install()
    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    counted = []
    for optimizer in (first, second, first, second, first, first, second):
        optimizer.step()
        counted.append(recorder.updates)
    observers.remove()
    assert counted == [1, 1, 2, 2, 3, 4, 4]


def test_two_loaders_at_once_are_both_seen_to_their_ends():
    recorder = TapeRecorder(deep_updates=64, cut=False)
    observers = Observers(recorder)
    observers.install()
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    one, other = (DataLoader(TensorDataset(torch.ones(6, 1)), batch_size=2) for _ in range(2))
    for _ in range(2):
        for (x,), (y,) in zip(one, other, strict=True):
            model(x + y).sum().backward()
            optimizer.step()
    observers.conclude()
    observers.remove()
    ends = [(e.loader, e.epoch, e.trained) for e in recorder.tape.of(EpochEnded)]
    assert sorted(ends) == [(0, 0, True), (0, 1, True), (1, 0, True), (1, 1, True)]


@pytest.mark.slow
@pytest.mark.parametrize("loop", PAIRS, ids=lambda loop: loop.stem)
def test_a_cut_changes_no_finding(loop: matrix.Loop, hasty: ForkServer):
    """Every plain pair again, its passes cut as early as can be."""
    came = matrix.outcome(loop, hasty)
    assert [finding.pitfall for finding in came.findings] == loop.expected, came.findings


def test_passes_are_cut_here(loops: Path, hasty: ForkServer, tmp_path: Path):
    (story,) = check_script(loops / "double-step_fixed.py", forkserver=hasty, cwd=tmp_path).stories
    assert [event.cut for event in story.ends(0)] == [True, True]
    given = Counter(event.epoch for event in story.tape.of(BatchGiven))
    assert all(given[event.epoch] < 8 for event in story.ends(0))

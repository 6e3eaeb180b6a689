"""Each private name of torch that the check uses is there, and does what it is used for."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from onehour.check.observe import internals

CHECK = Path(internals.__file__).parents[1]


def optimizer() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


def test_the_names_of_classes_and_attributes():
    loader = DataLoader([0, 1], num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
    assert hasattr(DistributedDataParallel, internals.REFUSES_CPU)
    assert {"_iterator", "_DataLoader__multiprocessing_context"} <= vars(loader).keys()
    assert hasattr(loader, "_index_sampler")
    assert issubclass(nn.SyncBatchNorm, internals.BATCHNORM)
    assert issubclass(nn.BatchNorm2d, internals.BATCHNORM)


def test_the_parts_of_a_scheduler():
    stepping = optimizer()
    one, other = (lr_scheduler.StepLR(stepping, 1) for _ in range(2))
    assert internals.parts_of(one) == []
    assert internals.parts_of(lr_scheduler.ChainedScheduler([one, other], stepping)) == [one, other]
    assert internals.parts_of(lr_scheduler.SequentialLR(stepping, [one, other], milestones=[1])) == [one, other]


@pytest.mark.filterwarnings("error")
def test_a_scheduler_of_an_optimizer_that_never_steps_does_not_warn():
    never = optimizer()
    scheduler = lr_scheduler.StepLR(never, 1)
    internals.as_if_stepped(never)
    scheduler.step()


def test_a_step_that_no_hook_sees():
    seen: list[str] = []
    stepping = optimizer()
    (parameter,) = stepping.param_groups[0]["params"]
    parameter.grad = torch.ones(1)
    stepping.register_step_post_hook(lambda *_: seen.append("stepped"))
    internals.step_unseen(stepping)
    assert float(parameter.detach()) == pytest.approx(0.9)
    assert seen == []


@pytest.mark.parametrize("power", [2, 3])
def test_the_exponent_of_a_power(power: int):
    assert internals.exponent(torch.ones(1, requires_grad=True).pow(power).grad_fn) == power


def test_processes_that_persist_are_handed_over():
    loader, copied = (DataLoader(torch.arange(4), num_workers=1, persistent_workers=True) for _ in range(2))  # type: ignore[arg-type]
    assert [int(batch) for batch in copied] == [0, 1, 2, 3]
    internals.hand_over(copied, loader)
    assert vars(loader)["_iterator"] is vars(copied)["_iterator"] is not None
    assert [int(batch) for batch in loader] == [0, 1, 2, 3]


def test_no_other_file_of_the_check_knows_them():
    names = r"_BatchNorm\b", r"_passing_sync", r"_iterator\"", r"\b_index_sampler", r"_DataLoader__", r"_opt_called"
    private = re.compile("|".join([*names, r"\"_schedulers", r"_saved_exponent", r"torch\._[a-z]"]))
    for path in sorted(CHECK.rglob("*.py")):
        if path.name != "internals.py":
            assert not private.search(path.read_text(encoding="utf-8")), path

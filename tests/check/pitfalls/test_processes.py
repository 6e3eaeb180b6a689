"""Whether processes train one model: judged from hand-written updates, and on scripts that forget what DDP does."""

from collections.abc import Callable
from typing import Any

import pytest

from onehour.check.case import Case
from onehour.check.pitfalls import judge, not_judged
from onehour.check.run.checking import Checked
from onehour.check.story import Story
from onehour.check.tape import Tape, WeightsUpdated

HEAD = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
generator = torch.Generator().manual_seed(0)
data = TensorDataset(torch.randn(64, 4, generator=generator), torch.randint(0, 3, (64,), generator=generator))
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=8, sampler=sampler)


def mean(tensor):
    dist.all_reduce(tensor)
    return tensor / world


def train(net, optimizer, averaged=(), after=lambda: None):
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            for p in averaged:
                p.grad = mean(p.grad)
            optimizer.step()
            after()


def sgd(*modules):
    return torch.optim.SGD([p for module in modules for p in module.parameters()], lr=0.1, momentum=0.9)


torch.manual_seed(0)
"""

SCRIPTS = {
    "a head outside of DDP": (
        "body, head = DistributedDataParallel(nn.Linear(4, 8)), nn.Linear(8, 3)\n"
        "train(nn.Sequential(body, head), sgd(body, head))\n",
        "2 of 4 parameters are updated by another gradient on each of the 2 processes: 1.weight, 1.bias",
    ),
    "an expert of one's own": (
        "net = nn.Sequential()\nnet.add_module('body', nn.Linear(4, 8))\nnet.add_module('experts', nn.Linear(8, 3))\n"
        "train(net, sgd(net), averaged=list(net.body.parameters()))\n",
        None,
    ),
    "no_sync at every pass": (
        "net = DistributedDataParallel(nn.Linear(4, 3))\n"
        "def alone(x):\n    with net.no_sync():\n        return net(x)\n"
        "train(alone, sgd(net))\n",
        "2 of 2 parameters are updated by another gradient",
    ),
    "averaged by hooks": (
        "net = nn.Linear(4, 3)\nfor p in net.parameters():\n    p.register_hook(mean)\ntrain(net, sgd(net))\n",
        None,
    ),
    "averaged by hooks, from other weights": (
        "torch.manual_seed(rank)\nnet = nn.Linear(4, 3)\nfor p in net.parameters():\n    p.register_hook(mean)\n"
        "train(net, sgd(net))\n",
        "process 1's weights differ from process 0's by",
    ),
    "the weights are averaged now and then": (
        "net = nn.Linear(4, 3)\ncount = 0\ndef average():\n    global count\n    count += 1\n    if count % 3 == 0:\n"
        "        for p in net.parameters():\n            p.data = mean(p.data)\ntrain(net, sgd(net), after=average)\n",
        None,
    ),
    "process 0's weights are sent": (
        "net = nn.Linear(4, 3)\ndef send():\n    for p in net.parameters():\n        dist.broadcast(p.data, 0)\n"
        "train(net, sgd(net), after=send)\n",
        "2 of 2 parameters are updated by another gradient",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name: str, checked: Callable[[str], Checked]):
    text, said = SCRIPTS[name]
    found = [finding.measured for finding in checked(HEAD + text).findings]
    assert [measured.startswith(said or "") for measured in found] == ([True] if said else []), found


Numbers = list[tuple[float, float, float]]
"""A weight before and after each update, and the gradient that it took."""


def case(*processes: Numbers, name: str = "weight", parted: bool = False) -> Case:
    stories = []
    for updates in processes:
        tape = Tape()
        for before, after, gradient in updates:
            values: dict[str, Any] = {
                "before": {name: [before]},
                "after": {name: [after]},
                "gradients": {name: [gradient]},
            }
            tape.add(WeightsUpdated("train.py:9", **values, parted=[name] * parted))
        stories.append(Story(tape))
    return Case(stories)


def found(case: Case) -> list[str]:
    return [finding.pitfall for finding in judge(case)]


def test_one_gradient_for_all_is_right():
    same = [(1.0, 0.9, 1.0), (0.9, 0.8, 1.0)]
    assert found(case(same, same)) == []
    assert found(case(same)) == []
    rounded = [(1.0, 0.9, 1.0), (0.9, 0.8 + 1e-8, 1.0 + 1e-7)]  # added in another order
    assert found(case(same, rounded)) == []


@pytest.mark.parametrize(
    "other",
    [
        [(1.0, 0.8, 2.0), (0.8, 0.7, 1.0)],
        [(1.0, 0.9, 1.0), (0.9, 0.85, 0.5)],  # only the last, which nobody could have averaged yet
        [(1.0, 0.95, 1.0), (0.95, 0.9, 1.0)],  # another rate
        [(1.0, 0.8, 2.0), (0.9, 0.7, 2.0)],  # process 0's weights are sent to all
    ],
)
def test_gradients_or_weights_that_differ(other: Numbers):
    assert found(case([(1.0, 0.9, 1.0), (0.9, 0.8, 1.0)], other)) == ["gradients-not-averaged"]


def test_weights_that_are_averaged_are_right():
    first, second = [(1.0, 0.9, 1.0), (0.85, 0.75, 1.0)], [(1.0, 0.8, 2.0), (0.85, 0.7, 1.5)]
    assert found(case(first, second)) == []


def test_what_each_process_has_for_itself_is_said():
    apart = case([(1.0, 0.9, 1.0)], [(2.0, 1.8, 2.0)], name="experts.0.weight", parted=True)
    assert found(apart) == []
    note = not_judged(apart)[-1]
    assert note.startswith("experts.0.weight: their gradients differ between processes")
    assert note.pitfalls == ("gradients-not-averaged",)

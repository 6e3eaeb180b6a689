"""How an epoch is divided among processes, judged from the orders that they took."""

import itertools
import random
from array import array
from base64 import b64encode
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

import pytest

from onehour.check.case import Case
from onehour.check.pitfalls import judge
from onehour.check.story import Story
from onehour.check.tape import (
    BackwardPass,
    BatchGiven,
    EpochBegan,
    EpochEnded,
    GroupJoined,
    LoaderSeen,
    OptimizerStep,
    SampleOrder,
    Tape,
)

Orders = list[list[list[int]]]
"""By process, then by epoch."""


def case(samples: int, orders: Orders, batch: int = 4, evaluation: Orders | None = None, **loader: Any) -> Case:
    stories = []
    for rank, passes in enumerate(orders):
        tape = Tape()
        tape.add(GroupJoined())
        options: dict[str, Any] = {"batch_size": batch, "sampler": "S", "probe": [1.0]} | loader
        tape.add(LoaderSeen("train.py:3", loader=0, samples=samples, **options))
        for epoch, order in enumerate(passes):
            tape.add(EpochBegan("train.py:5", loader=0, epoch=epoch, order=about(order, batch)))
            for index in range(0, len(order), batch):
                tape.add(BatchGiven(loader=0, epoch=epoch, index=index // batch, size=len(order[index:][:batch])))
                tape.add(BackwardPass("train.py:7", terms=[], samples=None))
                tape.add(OptimizerStep("train.py:8", optimizer=0, rates=[0.1], closure=False))
            tape.add(EpochEnded(loader=0, epoch=epoch, cut=False, followed=True, trained=True))
        if evaluation is not None:
            order = evaluation[rank][0]
            tape.add(LoaderSeen("train.py:4", loader=1, samples=10, **options))
            tape.add(EpochBegan("train.py:9", loader=1, epoch=0, order=about(order, batch)))
            tape.add(EpochEnded(loader=1, trained=False, samples=10))
        stories.append(Story(tape))
    return Case(stories)


def about(order: Sequence[int], batch: int) -> SampleOrder:
    digest = blake2b(repr(list(order)).encode()).hexdigest()
    indices = b64encode(array("q", order).tobytes()).decode()
    return SampleOrder(len(order), len(set(order)), digest, hash(frozenset(order)), largest=batch, indices=indices)


def permutation(samples: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(samples), samples)


def padded(samples: int, processes: int, epochs: int = 2) -> Orders:
    """torch's DistributedSampler."""
    passes = []
    for epoch in range(epochs):
        order = permutation(samples, epoch)
        order += order[: -samples % processes]
        passes.append([order[rank::processes] for rank in range(processes)])
    return [list(each) for each in zip(*passes, strict=True)]


def stream(samples: int, minibatch: int, processes: int, epochs: int = 2, batch: int = 4) -> Orders:
    """Iterations of whole minibatches that straddle epochs, each dealt to the processes."""
    endless = [i for epoch in range(epochs + 1) for i in permutation(samples, epoch)]
    ends = [-(-epoch * samples // minibatch) * minibatch for epoch in range(epochs + 1)]
    passes = [endless[a:b] for a, b in itertools.pairwise(ends)]
    workers = minibatch // batch
    own = [[w for w in range(workers) if w * processes // workers == rank] for rank in range(processes)]
    return [
        [
            [order[t + w + j * workers] for t in range(0, len(order), minibatch) for w in mine for j in range(batch)]
            for order in passes
        ]
        for mine in own
    ]


def measured(*arguments: Any, **options: Any) -> dict[str, str]:
    return {finding.pitfall: finding.measured for finding in judge(case(*arguments, **options))}


def test_a_permutation_that_is_divided_is_right():
    assert measured(32, padded(32, 2)) == {}


@pytest.mark.parametrize(("samples", "minibatch"), [(200, 32), (203, 8), (205, 8), (200, 128), (64, 64), (250, 16)])
@pytest.mark.parametrize("processes", [2, 4])
def test_a_stream_that_straddles_epochs_repeats_nothing(samples: int, minibatch: int, processes: int):
    batch = minibatch // processes
    assert measured(samples, stream(samples, minibatch, processes, batch=batch), batch=batch) == {}


@pytest.mark.parametrize(("samples", "repeated"), [(31, 1), (255, 1), (29, 3)])
def test_padding_is_counted(samples: int, repeated: int):
    processes = 4 if repeated == 3 else 2
    said = measured(samples, padded(samples, processes))
    assert said == {
        "padded-training-data": f"an epoch takes {samples + repeated} samples, {repeated} of them twice (S)"
    }


def test_processes_that_take_everything():
    orders = [[permutation(32, 10 * rank + epoch) for epoch in range(2)] for rank in range(2)]
    said = "2 processes take 64 samples an epoch, 32 of them different, "
    assert measured(32, orders) == {"overlapping-shards": said + "each in an order of its own"}
    assert measured(32, [orders[0], orders[0]]) == {"overlapping-shards": said + "in the same order"}


def test_shares_of_orders_with_different_seeds():
    orders = [[permutation(64, 10 * rank + epoch)[rank::2] for epoch in range(2)] for rank in range(2)]
    different = len(set(orders[0][0]) | set(orders[1][0]))
    assert different < 64
    said = measured(64, orders)["overlapping-shards"]
    assert said == f"2 processes take 64 samples an epoch, {different} of them different, each in an order of its own"


def test_shares_that_stay():
    orders = [[random.Random(epoch).sample(range(rank, 32, 2), 16) for epoch in range(2)] for rank in range(2)]
    assert measured(32, orders) == {
        "shuffle-within-shard": "each process takes the same 16 samples in epochs 0 and 1, of 32"
    }


def test_evaluations_count_each_sample_once():
    train = padded(32, 2)
    exact = [[list(range(rank, 10, 2))] for rank in range(2)]
    assert measured(32, train, evaluation=exact) == {}
    whole = [[list(range(10))] for _ in range(2)]
    assert measured(32, train, evaluation=whole) == {}
    three = [[[*range(rank, 10, 3)] + ([rank - 1] if rank else [])] for rank in range(3)]
    assert measured(33, padded(33, 3), evaluation=three) == {
        "padded-evaluation": "12 samples are evaluated, 2 of them twice (S)"
    }
    dropped = [[list(range(rank, 8, 2))] for rank in range(2)]
    assert measured(32, train, evaluation=dropped, drop_last=True) == {
        "dropped-evaluation": "8 of 10 validation samples are evaluated (drop_last)"
    }


HEAD = """
import itertools
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

torch.manual_seed(0)
x, y = torch.randn(86, 8), torch.randint(0, 3, (86,))
training, validation = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])
model = nn.Linear(8, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)


def learn(inputs, labels):
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def evaluate(loader):
    with torch.no_grad():
        return sum((model(inputs).argmax(1) == labels).sum().item() for inputs, labels in loader) / 22


def loaders(shuffle):
    return DataLoader(training, batch_size=8, shuffle=shuffle), DataLoader(validation, batch_size=8)


"""

SCRIPTS = {
    "slices, and a loader for the evaluation": (
        "held = DataLoader(validation, batch_size=8)\nfor epoch in range(6):\n    for i in range(0, 64, 8):\n"
        "        learn(x[i : i + 8], y[i : i + 8])\n    evaluate(held)\n",
        True,
    ),
    "permuted slices, and a loader for the evaluation": (
        "held = DataLoader(validation, batch_size=8)\nfor epoch in range(6):\n    order = torch.randperm(64)\n"
        "    for part in order.split(8):\n        learn(x[part], y[part])\n    evaluate(held)\n",
        False,
    ),
    "batches that are kept": (
        "kept = itertools.cycle(DataLoader(training, batch_size=8, shuffle=True))\nfor step in range(100):\n"
        "    learn(*next(kept))\n",
        True,
    ),
    "batches that are kept, and shuffled": (
        "kept = list(DataLoader(training, batch_size=8))\nfor epoch in range(5):\n"
        "    for i in torch.randperm(8).tolist():\n        learn(*kept[i])\n",
        False,
    ),
    "a text in its order, with the state of the batch before": (
        "model, own = nn.LSTM(8, 3), None\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for epoch in range(5):\n    state = torch.zeros(1, 3), torch.zeros(1, 3)\n"
        "    for inputs, labels in DataLoader(training, batch_size=8):\n        optimizer.zero_grad()\n"
        "        output, state = model(inputs, state)\n        F.cross_entropy(output, labels).backward()\n"
        "        optimizer.step()\n        state = [part.detach() for part in state]\n",
        False,
    ),
    "loaders that a function makes": (
        "for epoch in range(5):\n    train, held = loaders(False)\n    for inputs, labels in train:\n"
        "        learn(inputs, labels)\n    evaluate(held)\n",
        True,
    ),
    "shuffled loaders that a function makes": (
        "for epoch in range(5):\n    train, held = loaders(True)\n    for inputs, labels in train:\n"
        "        learn(inputs, labels)\n    evaluate(held)\n",
        False,
    ),
    "one line for training and evaluation": (
        "for epoch in range(5):\n    for data in (training, validation):\n"
        "        for inputs, labels in DataLoader(data, batch_size=8, shuffle=data is training):\n"
        "            learn(inputs, labels) if data is training else evaluate([(inputs, labels)])\n",
        False,
    ),
    "folds": (
        "for fold in range(4):\n    part = [i for i in range(64) if i % 4 != fold]\n    for epoch in range(2):\n"
        "        for inputs, labels in DataLoader(Subset(training, part), batch_size=8, shuffle=True):\n"
        "            learn(inputs, labels)\n",
        False,
    ),
    "data that are made anew": (
        "for epoch in range(5):\n    data = TensorDataset(torch.randn(64, 8), torch.randint(0, 3, (64,)))\n"
        "    for inputs, labels in DataLoader(data, batch_size=8):\n        learn(inputs, labels)\n",
        False,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_where_an_epoch_s_order_comes_from(name: str, found: Callable[[str], list[str]]):
    text, same = SCRIPTS[name]
    assert found(HEAD + text) == ["same-order-every-epoch"] * same

"""The check's observers around a loop in a test, what they wrote down, and how a script that is checked begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from onehour.check.observe import Observers
from onehour.check.observe.recorder import TapeRecorder
from onehour.check.tape import E, Tape, Trouble

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F
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
"""Of a script, before its loop."""

STEP = """
import torch
weight = torch.nn.Parameter(torch.ones(1))
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    (weight**2).sum().backward()
    optimizer.step()
"""
"""The smallest script that can be judged."""


class Watched:
    """All observers for the time of a block."""

    def __init__(self, **options: Any) -> None:
        self.recorder = TapeRecorder(**({"deep_updates": 64, "cut": False} | options))
        self.observers = Observers(self.recorder)

    def __enter__(self) -> Tape:
        self.observers.install()
        return self.recorder.tape

    def __exit__(self, *error: object) -> None:
        self.observers.conclude()
        self.observers.remove()


def events(tape: Tape, kind: type[E]) -> list[E]:
    """Those of a kind, where no observer failed."""
    assert not list(tape.of(Trouble))
    return list(tape.of(kind))


def scalar() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(model.weight)
    return model

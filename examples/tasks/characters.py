"""A language model of characters, with AdamW: lines of unequal length are padded, and what is padded does not count.

onehour train characters.toml --trust
"""

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import onehour

CHARACTERS = "0123456789+= "
PADDING = -1


class Sums(Dataset[Tensor]):
    """Lines as "12+930=942", as numbers of their characters."""

    def __init__(self, count: int, *, seed: int) -> None:
        draw = random.Random(seed)
        pairs = [
            (draw.randrange(10 ** draw.randint(1, 3)), draw.randrange(10 ** draw.randint(1, 3))) for _ in range(count)
        ]
        self.lines = [f"{a}+{b}={a + b} " for a, b in pairs]

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([CHARACTERS.index(character) for character in self.lines[index]])


def data() -> tuple[Sums, Sums]:
    return Sums(400, seed=0), Sums(100, seed=1)


def collate(lines: list[Tensor]) -> Tensor:
    """(N, T) of the longest line; others end with `PADDING`."""
    return nn.utils.rnn.pad_sequence(lines, batch_first=True, padding_value=PADDING)


class Model(nn.Module):
    """Logits (N, T, characters) of each next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), 16)
        self.memory = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, len(CHARACTERS))

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.memory(self.embedding(characters))[0])


def task(model: nn.Module, lines: Tensor) -> onehour.Sums:
    following = lines[:, 1:]
    logits, real = model(lines[:, :-1].clamp(min=0)), following != PADDING
    losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=PADDING, reduction="sum")
    wrong = ((logits.argmax(2) != following) & real).sum()
    return onehour.Sums(losses, real.sum(), {"character error %": (100 * wrong, real.sum())})

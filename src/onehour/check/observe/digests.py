"""Digests of what happens: projections of tensors, which add as the tensors do, and the states of random generators."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

PARAMETERS, PROJECTIONS, ELEMENTS = 4, 2, 1 << 16
"""How many parameters of an optimizer are looked at, numbers for each, and how much of a large one."""
FOLD, SAMPLES = 1 << 10, 16


def chosen_parameters(parameters: Iterable[Tensor]) -> list[Tensor]:
    """A few trainable parameters, the first, the last and some between: enough to see how gradients are combined.

    >>> [p.numel() for p in chosen_parameters(torch.ones(n, requires_grad=True) for n in range(1, 9))]
    [1, 3, 6, 8]
    """
    trainable = [p for p in parameters if p.requires_grad and p.is_leaf and p.is_floating_point() and p.numel()]
    last = len(trainable) - 1
    picks = sorted({round(i * last / (PARAMETERS - 1)) for i in range(PARAMETERS)}) if trainable else []
    return [trainable[i] for i in picks]


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor of a batch, wherever it lies in lists, tuples and dicts."""
    if torch.is_tensor(values):
        return values
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        values = getattr(values, "__dict__", {}).values()
    return next((found for value in values if (found := first_tensor(value)) is not None), None)


def projections(tensors: Sequence[Tensor | None]) -> list[float]:
    """Projections of each tensor onto fixed directions, in float64; None and what is not finite count as zeros."""
    numbers: list[float] = []
    for tensor in tensors:
        values = leading(tensor) if tensor is not None else torch.zeros(0, dtype=torch.float64)
        numbers += (_directions(values.numel()) @ values).tolist()
    return [number if math.isfinite(number) else 0.0 for number in numbers]


@torch.no_grad()
def folded(tensor: Tensor) -> list[float]:
    """Projections of all of a tensor, or of this process's shard: every FOLD-th element is added first."""
    flat = _held(tensor).reshape(-1)
    rest = flat.numel() % FOLD
    sums = flat[: flat.numel() - rest].view(flat.numel() // FOLD, FOLD).sum(0, dtype=torch.float64)
    sums[:rest] += flat[flat.numel() - rest :]
    return (_directions(FOLD) @ sums.cpu()).tolist()


@torch.no_grad()
def leading(tensor: Tensor) -> Tensor:
    """The first elements of a tensor, or of this process's shard, flat, in float64 on the CPU: always the same ones."""
    return _held(tensor).reshape(-1)[:ELEMENTS].to("cpu", torch.float64, copy=True)


def _held(tensor: Tensor) -> Tensor:
    """A tensor without its gradient, dense; of a DTensor the shard that this process holds, without asking others."""
    own = tensor.detach()
    own = getattr(own, "to_local", lambda: own)()
    return own.to_dense() if own.layout != torch.strided else own


def looks(batch: Tensor) -> list[list[float]]:
    """What hardly changes when a sample is flipped, cropped or made noisy: its mean, deviation, least and largest.

    >>> looks(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    [[2.0, 1.0, 1.0, 3.0], [2.0, 0.0, 2.0, 2.0]]
    """
    rows = batch.detach()[:SAMPLES].reshape(len(batch[:SAMPLES]), -1).to("cpu", torch.float64)
    if not rows.numel():
        return []
    return torch.stack([rows.mean(1), rows.std(1, correction=0), rows.amin(1), rows.amax(1)], dim=1).tolist()


@lru_cache(maxsize=64)
def _directions(elements: int) -> Tensor:
    generator = torch.Generator().manual_seed(elements)  # one of its own: the user's numbers stay as they are
    return torch.randn(PROJECTIONS, elements, generator=generator, dtype=torch.float64)


def in_a_graph() -> bool:
    """Whether torch compiles or traces what is called: an observer's own operations would be parts of its graph."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def random_states() -> dict[str, str]:
    """A digest of each generator's state; numpy's where it is loaded."""
    states = {"torch": torch.get_rng_state().numpy().tobytes(), "random": repr(random.getstate()).encode()}
    if "numpy" in sys.modules:
        state = sys.modules["numpy"].random.get_state()
        states["numpy"] = state[1].tobytes() + repr(state[2:]).encode()
    return {name: blake2b(state, digest_size=8).hexdigest() for name, state in states.items()}


def seed_all(seed: int | None = None) -> None:
    """Without a seed as in a new process: one that no other has."""
    random.seed(seed)
    torch.default_generator.seed() if seed is None else torch.default_generator.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Generators that start from a seed inside, and go on outside as if nothing had been."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    numbers = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(numbers)

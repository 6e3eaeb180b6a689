"""The global generators of random numbers: torch's, Python's and numpy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def random_states() -> dict[str, str]:
    """A digest of each generator's state; numpy's where it is loaded.

    >>> before = random_states(); _ = torch.rand(1)
    >>> [name for name, digest in random_states().items() if digest != before[name]]
    ['torch']
    """
    states = {"torch": torch.get_rng_state().numpy().tobytes(), "random": repr(random.getstate()).encode()}
    if "numpy" in sys.modules:
        state = sys.modules["numpy"].random.get_state()
        states["numpy"] = state[1].tobytes() + repr(state[2:]).encode()
    return {name: blake2b(state, digest_size=8).hexdigest() for name, state in states.items()}


def fresh_seeds() -> None:
    """Seeds as a new process has them: none that another has.

    >>> fresh_seeds(); a = random.random(); fresh_seeds(); a == random.random()
    False
    """
    random.seed()
    torch.default_generator.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Generators that start from a seed inside, and go on outside as if nothing had been.

    >>> before = random_states()
    >>> with seeded(1): a = torch.rand(1)
    >>> with seeded(1): b = torch.rand(1)
    >>> bool(a == b), random_states() == before
    (True, True)
    """
    numpy = sys.modules.get("numpy")
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state() if numpy else None
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])

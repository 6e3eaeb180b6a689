"""Everything random is keyed in one place, so nothing depends on processes, loaders or resumes."""

from __future__ import annotations

import hashlib

import numpy as np

from onehour.rules.arguments import whole_number

__all__ = ["seed_for"]


def seed_for(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed that is a pure function of the run's seed, a purpose and integer keys.

    Different purposes or keys give independent streams (BLAKE2b), the same ones the same stream on any
    machine. 63 bits suit torch, numpy and JSON alike.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, e.g. "permutation".
        keys: what they belong to, e.g. the epoch and the sample's index.

    >>> seed_for(0, "permutation", 3) == seed_for(0, "permutation", 3)
    True
    >>> seed_for(0, "permutation", 3) == seed_for(0, "weights", 3)
    False
    """
    text = "\0".join((str(whole_number("seed", seed)), purpose, *(str(whole_number("key", key)) for key in keys)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def random_bits(key: int, count: int) -> np.ndarray:
    """`count` random 64-bit integers of the counter-based generator Philox under `key`.

    Raw bits only: numpy keeps those of its bit generators unchanged between versions, but not the
    distributions and permutations made from them.
    """
    return np.random.Philox(key=key).random_raw(count)

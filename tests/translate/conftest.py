"""A small recipe whose boundaries fall between iterations, and a translation executed as its user would."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from onehour.config import Recipe


@pytest.fixture(scope="session")
def acting() -> ModuleType:
    """act.py beside this file."""
    spec = importlib.util.spec_from_file_location("act", Path(__file__).parent / "act.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small() -> Callable[..., Recipe]:
    """500 iterations over 24 epochs of 1000 samples, 20 5/6 an epoch; two workers."""

    def make(**changes: Any) -> Recipe:
        return Recipe(
            name="small",
            samples=1000,
            minibatch=48,
            per_worker=24,
            base_lr=0.01,
            base_minibatch=12,
            epochs=24,
            milestones=("8", "16", "64/3"),
        ).replace(**changes)

    return make


@pytest.fixture(scope="session")
def farthest() -> Callable[[Recipe, list[float]], float]:
    """The largest difference between rates, one an iteration, and the recipe's."""

    def largest(recipe: Recipe, rates: list[float]) -> float:
        assert recipe.samples is not None
        epochs = [t * recipe.minibatch / recipe.samples for t in range(len(rates))]
        return max(abs(rate - recipe.schedule(epoch)) for rate, epoch in zip(rates, epochs, strict=True))

    return largest

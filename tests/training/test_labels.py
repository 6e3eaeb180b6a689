"""A label that is no class is bad input, wherever it is read: which side, which sample, its value, and what C is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from onehour import Recipe
from onehour.api import train
from onehour.data.dataset import KeyedDataset
from onehour.data.sources import complete
from onehour.dist.group import Group
from onehour.sweeps.verify import trace
from onehour.training.evaluate import OpenedWeights
from onehour.training.seeds import train_seeds
from onehour.training.weights import read_weights, write_weights

AT = 5
RIGHT = object()
"""Every label is as it should be."""


class Labelled(KeyedDataset):
    """Samples in files, one of which has another label; perhaps it says what its classes are."""

    def __init__(self, tensors: TensorDataset, label: Any = RIGHT, classes: Sequence[str] | None = None) -> None:
        self.tensors, self.label = tensors, label
        if classes is not None:
            self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.tensors[index]
        return image, int(label) if self.label is RIGHT or index != AT else self.label

    def name(self, index: int) -> str:
        return f"images/{index}.npy"


OUTSIDE = [
    (-100, "the label is -100"),
    (3, "the label is 3"),
    (-1, "the label is -1"),
    (2**40, "label is 1099511627776"),
]
NO_NUMBER = [(2.7, "the label 2.7 is not a whole number"), (math.nan, "label nan"), ("2", "label"), (None, "label")]
KINDS = [(np.int64(-100), "label is -100"), (torch.tensor(3), "label is 3"), (np.float32(2.7), "label 2.7")]


@pytest.mark.parametrize(
    ("side", "label", "said"),
    [
        *(("training", *bad) for bad in OUTSIDE + NO_NUMBER + KINDS),
        *(("validation", *bad) for bad in OUTSIDE[:1] + NO_NUMBER[:1]),
    ],
)
def test_a_label_that_is_no_class_names_the_sample(tiny: ModuleType, tmp_path: Path, side: str, label: Any, said: str):
    sides = [Labelled(tensors, label if which == side else RIGHT) for which, tensors in _sides(tiny)]
    with pytest.raises(ValueError, match="expected a whole number") as raised:
        train(tiny.recipe(), data=tuple(sides), loaders=0, out=tmp_path / "run")
    text = str(raised.value)
    assert text.startswith(f"{side} sample {AT} (images/{AT}.npy): ")
    assert said in text
    assert text.endswith("expected a whole number from 0 to 2, since C = 3 (the model's outputs)")


@pytest.mark.parametrize("side", ["training", "validation"])
def test_it_is_found_in_the_processes_that_load(tiny: ModuleType, tmp_path: Path, side: str):
    sides = [Labelled(tensors, -100 if which == side else RIGHT) for which, tensors in _sides(tiny)]
    with pytest.raises(ValueError, match=rf"^{side} sample 5 \(images/5.npy\): the label is -100; expected a whole"):
        train(tiny.recipe(), data=tuple(sides), loaders=2, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("names", "classes", "source"),
    [
        (None, None, "the model's outputs"),
        ("abc", None, "the data's classes"),
        ("ab", None, "the data's classes"),
        (None, 2, "the recipe's classes"),
    ],
)
def test_where_c_comes_from_is_said(
    tiny: ModuleType, tmp_path: Path, names: str | None, classes: int | None, source: str
):
    sides = [Labelled(tensors, 7, names) for _, tensors in _sides(tiny)]
    count = classes or len(names or "abc")
    with pytest.raises(ValueError, match=rf"since C = {count} \({source}\)$"):
        train(tiny.recipe(classes=classes), data=tuple(sides), loaders=0, out=tmp_path / "run")


@pytest.mark.parametrize(("side", "label", "classes"), [("training", -100, None), ("validation", 3, 3)])
def test_tensors_in_memory_are_looked_through_before_anything_is_written(
    tiny: ModuleType, tmp_path: Path, side: str, label: int, classes: int | None
):
    sides = dict(_sides(tiny))
    sides[side].tensors[1][AT] = label
    with pytest.raises(
        ValueError, match=rf"{side} sample 5: the label is {label}; expected a whole number from 0 to 2"
    ):
        train(tiny.recipe(classes=classes), data=tuple(sides.values()), out=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_side_in_memory_is_looked_through_too(tiny: ModuleType, tmp_path: Path):
    sides = dict(_sides(tiny))
    sides["validation"].tensors[1][AT] = -100
    data = Labelled(sides["training"]), sides["validation"]
    with pytest.raises(ValueError, match=r"^validation sample 5: the label is -100"):
        train(tiny.recipe(), data=data, loaders=0, out=tmp_path / "run")


def test_evaluating_a_file_and_verifying_and_seeds_as_one_network_look_too(tiny: ModuleType, tmp_path: Path):
    run = train(tiny.recipe(epochs=1, warmup_epochs=0), out=tmp_path / "run")
    weights = write_weights(read_weights(run.folder), tmp_path / "weights.safetensors")
    bad = tuple(Labelled(tensors, -100) for _, tensors in _sides(tiny))
    with pytest.raises(ValueError, match=r"^validation sample 5 \(images/5.npy\): the label is -100"):
        OpenedWeights(weights, recipe=tiny.recipe(), data=bad).evaluate()
    tensors = dict(_sides(tiny))
    tensors["validation"].tensors[1][AT] = -100
    for act in (_verified, _joined):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(tiny, "data", lambda: tuple(tensors.values()))
            with pytest.raises(ValueError, match=r"^validation sample 5: the label is -100"):
                act(tiny.recipe(), tmp_path)


def _verified(recipe: Recipe, folder: Path) -> None:
    trace(recipe, steps=1, group=Group(), folder=folder)


def _joined(recipe: Recipe, folder: Path) -> None:
    completed, data = complete(recipe)
    train_seeds([completed], data, [folder / "joint"], Group())


def _sides(tiny: ModuleType) -> list[tuple[str, TensorDataset]]:
    return list(zip(("training", "validation"), tiny.data(), strict=True))

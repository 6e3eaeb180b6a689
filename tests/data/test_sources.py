"""Data by name or by package.module:function, looked at before anything runs."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from onehour.data.digits import digits
from onehour.data.sources import Data, complete, file_reader, load_data


def side(images: Tensor, labels: Tensor | None = None) -> TensorDataset:
    return TensorDataset(images, torch.zeros(len(images), dtype=torch.long) if labels is None else labels)


GOOD = side(torch.zeros(4, 3, 8, 8))


@pytest.mark.parametrize(
    ("spec", "make"),
    [
        ("digits", digits),
        ("digits:0", digits),
        ("digits:7", lambda: digits(7)),
        ("digits-wide", lambda: digits(samples=32_768)),
        ("digits-wide:7", lambda: digits(7, samples=32_768)),
    ],
)
def test_a_split_of_the_embedded_data_by_name(spec: str, make: Callable[[], tuple[TensorDataset, TensorDataset]]):
    data = load_data(spec)
    assert (data.classes, data.channels) == (10, 1)
    for found, expected in zip((data.train, data.validation), make(), strict=True):
        assert all(torch.equal(*pair) for pair in zip(found.tensors, expected.tensors, strict=True))


def test_data_of_ones_own_by_name(tiny: ModuleType):
    data = load_data("tinytask:listed")
    assert (len(data.train), len(data.validation), data.classes, data.channels) == (48, 20, None, 1)


@pytest.mark.parametrize("labels", [[0, 1, 2, 1], [4, 0, 0, 0]])
def test_labels_in_memory_say_how_many_classes_there_are(labels: list[int]):
    images = torch.zeros(4, 3, 8, 8)
    assert Data.of(side(images, torch.tensor(labels)), GOOD).classes == max(labels) + 1
    assert Data.of(GOOD, side(images, torch.tensor(labels))).classes == max(labels) + 1


def test_a_data_set_may_name_its_classes(tiny: ModuleType):
    train, validation = tiny.listed()
    train.classes = ["cat", "dog", "cow"]
    assert Data.of(train, validation).classes == 3


def test_images_without_channels_count_as_one_channel():
    assert Data.of(side(torch.zeros(4, 8)), side(torch.zeros(4, 8))).channels == 8
    assert Data.of(side(torch.zeros(4)), side(torch.zeros(4))).channels == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        *(
            (f"digits:{split}", rf"data 'digits:{re.escape(split)}' names no division of digits; expected digits, or")
            for split in ("", "x", "-1", "1.5", " 1", "1:2", "²", "digits")
        ),
        ("digit", "no data is called 'digit'; expected digits"),
        ("digits-wid", "no data is called 'digits-wid'; expected digits-wide"),
        ("digit:1", "no data is called 'digit:1'; expected digits"),
        ("", "this recipe needs data; give --data"),
        ("nowhere:data", "data nowhere:data: nowhere cannot be imported: ModuleNotFoundError"),
        ("tinytask:dota", "tinytask has no 'dota'; expected data"),
        ("tinytask:failing", r"data tinytask:failing failed when called: RuntimeError: no disk \(.*tinytask\.py:\d+\)"),
        ("tinytask:number", r"data tinytask:number returned int; expected \(train, validation\)"),
    ],
)
def test_data_that_cannot_be_found_or_made_is_one_message(tiny: ModuleType, spec: str, message: str):
    with pytest.raises(ValueError, match=message) as raised:
        load_data(spec)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (GOOD, 7, "the validation data is a int; expected a map-style data set"),
        (GOOD, [], "the validation data is empty"),
        ([1, 2], GOOD, r"the training data's first item is not an \(image, label\) pair"),
        ([("cat.jpg", 0)], GOOD, "the training data's images are str; expected float tensors"),
        (side(torch.zeros(4, 3, 9, 9)), GOOD, r"shape \(3, 9, 9\), validation images \(3, 8, 8\); expected one"),
    ],
)
def test_unusable_data_is_refused(train: Any, validation: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Data.of(train, validation)


class Named(Dataset[Any]):
    """Two samples, and classes as somebody calls them."""

    def __init__(self, classes: Any) -> None:
        self.classes = classes

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 2, 2), index


@pytest.mark.parametrize(
    ("classes", "names"),
    [(["cat", "dog"], ["cat", "dog"]), (np.array(["a", "b"]), ["a", "b"]), (2, []), ([0, 1], []), ("cat", [])],
)
def test_classes_are_called_as_the_training_data_calls_them(classes: Any, names: list[str]):
    assert Data.of(Named(classes), Named(None)).names == names


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("digits:x", "names no division of digits"),
        ("", "this recipe needs data"),
        ("fashion-mnist:/gone", "predict reads no image files for data in MNIST's format, fashion-mnist:/gone"),
        ("<tuple>", "no data is called '<tuple>'"),
    ],
)
def test_a_recipe_without_data_that_can_be_found_reads_no_files(spec: str, said: str):
    with pytest.raises(ValueError, match=said):
        file_reader(spec)


@pytest.mark.parametrize(("field", "value"), [("data", "img\udcff"), ("freeze", ("a\udcff.*",)), ("name", "\udcff")])
def test_a_text_that_no_file_of_a_run_can_hold_is_named(tiny: ModuleType, field: str, value: Any):
    with pytest.raises(ValueError, match=rf"^{field} is .*\\udcff.*, which is not UTF-8, and a run's files are"):
        complete(tiny.recipe(**{field: value}))

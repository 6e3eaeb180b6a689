"""One data set as two: of each class the same share, keyed by the seed, read as before."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import images
import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from onehour.data.dataset import KeyedDataset, in_memory
from onehour.data.division import divide, divided
from onehour.data.images import divided_folder
from onehour.data.samples import Keyed
from onehour.data.sources import Data, load_data

LABELS = np.repeat([4, 0, 2], (50, 30, 11))[np.arange(91) * 37 % 91]


def test_each_class_is_divided_alike_and_nothing_is_lost_or_on_both_sides():
    train, validation = divide(LABELS, 0.1, seed=0)
    assert sorted([*train, *validation]) == list(range(91))
    assert train.tolist() == sorted(train)
    assert validation.tolist() == sorted(validation)
    assert {label: int((LABELS[validation] == label).sum()) for label in (0, 2, 4)} == {0: 3, 2: 1, 4: 5}


def test_the_seed_decides_and_nothing_else():
    parts = [divide(LABELS, 0.1, seed)[1].tolist() for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert parts[0] == [34, 35, 40, 63, 70, 83, 84, 86, 89]


@pytest.mark.parametrize(
    ("counts", "share", "said"),
    [
        ((9, 4), 0.1, "validation 0.1 leaves class 'dog' of 4 images without a validation image; use at least 0.125"),
        ((4, 9), 0.9, "validation 0.9 leaves class 'cat' of 4 images without a training image; use less than 0.875"),
        ((9, 1), 0.5, "class 'dog' has one image, and validation needs one beside it"),
    ],
)
def test_a_class_without_an_image_on_either_side_is_refused_with_what_works(
    counts: tuple[int, int], share: float, said: str
):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        divide(np.repeat([0, 1], counts), share, 0, ["cat", "dog"])


@pytest.mark.parametrize("count", [2, 3, 7, 11])
def test_the_bound_that_is_named_works(count: int):
    for share in (0.0001, 0.9999):
        with pytest.raises(ValueError, match="use ") as refused:
            divide(np.zeros(count, int), share, 0)
        bound = float(str(refused.value).rpartition(" ")[2])
        train, validation = divide(np.zeros(count, int), bound if share < 0.5 else bound - 1e-4, 0)
        assert len(train) >= 1
        assert len(validation) >= 1


class Named(KeyedDataset):
    """Draws from a key, names its samples, and says how they are read."""

    classes, skips = ("a", "b", "c"), True

    def __init__(self, tensors: TensorDataset) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def keyed(self, index: int, key: int) -> tuple[torch.Tensor, Any]:
        image, label = self.tensors[index]
        return image + key % 7, label

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        return images + 1

    def name(self, index: int) -> str:
        return f"{index}.npy"

    @property
    def facts(self) -> dict[str, Any]:
        return {"resized": 7}


def test_the_parts_of_a_data_set_offer_what_it_offers(tiny: ModuleType):
    tensors, _ = tiny.data()
    indices = divide(tensors.tensors[1].numpy(), 0.25, 3)
    for dataset in (tensors, tiny.Listed(tensors), Named(tensors)):
        parts = divided(dataset, 0.25, 3)
        for part, own in zip(parts, indices, strict=True):
            assert len(part) == len(own)
            assert in_memory(part) == (dataset is tensors)
            for place in (0, len(own) - 1):
                (image, label), (expected, same) = (
                    Keyed(each, seed=0)[(0, number)] for each, number in ((part, place), (dataset, int(own[place])))
                )
                assert label == same
                assert torch.equal(image, expected) or isinstance(dataset, Named)
    train = parts[0]
    assert (train.classes, train.skips, train.facts) == (Named.classes, True, {"resized": 7})
    assert torch.equal(train.keyed(1, 5)[0], dataset.keyed(int(indices[0][1]), 5)[0])
    assert train.name(1) == f"{indices[0][1]}.npy"
    assert train.prepare(torch.zeros(1)) == 1


def whole(root: Path, classes: dict[str, int]) -> Path:
    """ROOT/CLASS/*."""
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(images.saved(images.picture(number, (9, 9)), "PNG"))
    return root


@pytest.mark.parametrize(("item", "said"), [((0, None), "the label is nothing"), (None, "the item is not an")])
def test_a_sample_without_a_label_is_named(item: Any, said: str):
    with pytest.raises(ValueError, match=f"sample 9: {said}"):
        divided([(0, 1)] * 9 + [item], 0.5, 0)


@pytest.mark.parametrize("inside", ["", "train"])
def test_one_folder_is_both_sides(tmp_path: Path, inside: str):
    whole(tmp_path / inside, {"cat": 8, "dog": 4})
    train, validation = divided_folder(tmp_path, 0.25, 0)
    names = [[part.name(index) for index in range(len(part))] for part in (train, validation)]
    assert sorted([*names[0], *names[1]]) == sorted(map(str, (tmp_path / inside).glob("*/*")))
    assert [sum("cat" in name for name in side) for side in names] == [6, 2]
    assert (train.classes, train.augmented, validation.augmented) == (["cat", "dog"], True, False)
    assert load_data(str(tmp_path), share=0.25).looks[1].samples == 3


def test_a_class_may_be_called_train(tmp_path: Path):
    root = whole(tmp_path, {"train": 4, "ship": 4})
    (root / "train/.thumbnails").mkdir()
    train, _ = divided_folder(root, 0.5, 0)
    assert train.classes == ["ship", "train"]


def index(root: Path) -> None:
    (root / "onehour.index").touch()


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (lambda root: whole(root / "val", {"cat": 4}), "has a validation part; leave validation 0.1 out"),
        (index, "has a validation part; leave validation 0.1 out"),
        (lambda root: (root / "train" / "cat" / "0.png").rename(root / "train" / "0.png"), "nothing is read; move it"),
        (lambda root: None, "leaves class 'cat' of 4 images without a validation image; use at least 0.125"),
    ],
)
def test_a_folder_that_cannot_be_divided_is_one_message(tmp_path: Path, happens: Callable[[Path], object], said: str):
    happens(whole(tmp_path / "train", {"cat": 4}).parent)
    with pytest.raises(ValueError, match=said):
        load_data(str(tmp_path), share=0.1)


def test_a_folder_without_its_other_side_is_told_of_the_option(tmp_path: Path):
    with pytest.raises(ValueError, match=r"train is not a folder; .* or --validation 0\.1 to divide one folder"):
        load_data(str(whole(tmp_path, {"cat": 4})))


@pytest.mark.parametrize("spec", ["digits", "digits:7", "x.index", "c.tar.gz", "tinytask:data"])
def test_data_with_a_validation_part_is_not_divided(tiny: ModuleType, spec: str):
    with pytest.raises(ValueError, match=r"(has|with) a validation part; leave validation 0\.1 out"):
        load_data(spec, share=0.1)


def test_data_of_ones_own_may_be_one_data_set(tiny: ModuleType):
    train, _ = tiny.data()
    for given in (train, (train, None)):
        assert [look.samples for look in Data.given(given, "data is a", 0.25, 0).looks] == [36, 12]
    with pytest.raises(ValueError, match=r"is a TensorDataset; expected \(train, validation\), or one data set and"):
        Data.given(train, "data is a", 0.0, 0)
    with pytest.raises(ValueError, match="the training data is empty"):
        Data.given([], "data is a", 0.25, 0)

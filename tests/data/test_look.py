"""What is looked at before data is loaded: its first samples, and what its labels are."""

import enum
import os
import signal
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import onehour
from onehour.data.dataset import KeyedDataset, as_label
from onehour.data.samples import Keyed
from onehour.data.sources import Data, look


class Colour(enum.IntEnum):
    RED = 2


@pytest.mark.parametrize(
    "value",
    [
        *(2, 2.0, Colour.RED, Fraction(2), np.float16(2)),
        *(np.dtype(kind).type(2) for kind in ("b", "B", "h", "H", "i", "I", "l", "L", "f", "d")),
        *(np.array(2), np.array([2]), np.array([2], np.uint16), np.array(2.0), np.array([2], object)),
        *(torch.tensor(2), torch.tensor([2]), torch.tensor(2.0, requires_grad=True), torch.tensor(2).to(torch.uint16)),
        *(torch.tensor(2, dtype=torch.bfloat16), torch.tensor([2], dtype=torch.int8)),
    ],
)
def test_a_whole_number_is_one_whatever_holds_it(value: object):
    found = as_label(value)
    assert type(found) is int
    assert found == 2


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True)])
def test_true_is_one_as_in_python(value: object):
    assert as_label(value) == 1
    assert type(as_label(value)) is int


def test_a_label_below_zero_is_a_whole_number_too():
    assert (as_label(-100), as_label(torch.tensor(-100)), as_label(np.int8(-1))) == (-100, -100, -1)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (2.7, "the label 2.7 is not a whole number"),
        (np.float32("nan"), "the label nan is not a whole number"),
        (torch.tensor(float("inf")), "the label inf is not a whole number"),
        (1j, "the label 1j is not a whole number"),
        (torch.tensor(1j), "the label 1j is not a whole number"),
        (None, r"the label is nothing \(None\)"),
        ("cat", r"the label is a str \('cat'\)"),
        (b"1", "the label is a bytes"),
        ("x" * 9999, r"the label is a str .{,60}\); expected one whole number"),
        ([2], r"the label is a list \(\[2\]\)"),
        ({"label": 2}, "the label is a dict"),
        (np.array("cat"), "the label is a str"),
        (np.eye(4)[1], r"an array of shape \(4,\).* argmax where it is one-hot"),
        (torch.eye(4)[1], r"a tensor of shape \(4,\).* argmax where it is one-hot"),
        (torch.zeros(0), r"a tensor of shape \(0,\)"),
        (torch.zeros(1, 1), r"a tensor of shape \(1, 1\); expected one whole number$"),
    ],
)
def test_what_is_no_whole_number_is_refused_with_what_it_is(value: object, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        as_label(value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


N = 64
X, Y = torch.randn(N, 1, 8, 8, generator=torch.Generator().manual_seed(0)), np.arange(N) % 4
T = torch.from_numpy(Y)


class Plain(Dataset[Any]):
    def __len__(self) -> Any:
        return N

    def __getitem__(self, index: int) -> Any:
        return X[index], int(Y[index])


def giving(item: Callable[[int], Any], **attributes: Any) -> Any:
    """A data set with these items, and whatever else."""
    return type("Given", (Plain,), {"__getitem__": lambda self, index: item(index), **attributes})()


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))


def trained(data: Any, out: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {"minibatch": 32, "per_worker": 16, "warmup": "none", "epochs": 1, "classes": 4}
    return onehour.train(
        "resnet50", data=(data, data), model=net, out=out, device="cpu", threads=1, **(options | changes)
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(Plain(), tmp_path_factory.mktemp("plain") / "run", loaders=0)


LABELS = [
    *(lambda i: Y[i], lambda i: np.uint8(Y[i]), lambda i: np.array(Y[i]), lambda i: Y[i : i + 1]),
    *(lambda i: T[i], lambda i: T[i : i + 1], lambda i: T[i].to(torch.uint16), lambda i: float(Y[i])),
]


@pytest.mark.parametrize(("label", "loaders"), [*((label, 0) for label in LABELS), (LABELS[4], 1)])
def test_a_label_is_the_whole_number_that_it_is(label: Any, loaders: int, plain: Any, tmp_path: Path):
    run = trained(giving(lambda i: (X[i], label(i))), tmp_path / "run", loaders=loaders)
    assert run.summary["state_sha256"] == plain.summary["state_sha256"]


@pytest.mark.parametrize(
    "labels",
    [T[:, None], T.int(), T.byte(), T.float(), T.to(torch.uint16), T.float()[:, None], T.to(torch.int8), T.double()],
)
def test_and_so_are_those_in_memory(labels: Tensor, plain: Any, tmp_path: Path):
    run = trained(TensorDataset(X.clone().requires_grad_(), labels), tmp_path / "run")
    assert run.summary["state_sha256"] == plain.summary["state_sha256"]


ATTRIBUTES: dict[str, Any] = {
    "shape": (1, 8, 8),
    "prepare": lambda self: None,
    "facts": {"licence": "CC-BY"},
    "keyed": lambda self: 7,
    "skips": [3, 4],
    "name": lambda self: "mine",
    "index": {},
    "__getattr__": lambda self, name: lambda *given: name,
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_of_someones_is_not_taken_for_ours(name: str, plain: Any, tmp_path: Path):
    data = giving(Plain().__getitem__, **{name: ATTRIBUTES[name]})
    assert trained(data, tmp_path / "run", loaders=1).summary["state_sha256"] == plain.summary["state_sha256"]


def fails(self: Any) -> Any:
    raise RuntimeError("not yet")


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        *((["a", "b"], 2), (("a", "b"), 2), (np.array(["a", "b"]), 2), (5, 5), (np.int64(5), 5), (torch.tensor(5), 5)),
        *((None, None), (True, None), (0, None), (-3, None), (2.5, None), ([], None), ("imagenet", None)),
        *(({"cat": 0}, None), ({"cat"}, None), (lambda self: ["a", "b"], None), (property(fails), None)),
    ],
)
def test_classes_is_a_list_of_names_or_their_number_or_not_ours(classes: Any, found: int | None):
    assert look("training", giving(Plain().__getitem__, classes=classes)).classes == found


class Stream(IterableDataset[Any]):
    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        return iter([(X[0], 1)])


def killed(index: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (giving(lambda i: (X[i].tolist(), 1)), "images are list; expected float tensors"),
        (giving(lambda i: (X[i].numpy(), 1)), "images are ndarray; expected float tensors"),
        (giving(lambda i: (X[i].int(), 1)), r"images are torch\.int32; expected float tensors"),
        (giving(lambda i: (X[i] > 0, 1)), r"images are torch\.bool; expected float tensors"),
        (giving(lambda i: (X[i] + 0j, 1)), r"images are torch\.complex64; expected float tensors"),
        (giving(lambda i: (X[i].to_sparse(), 1)), r"images are torch\.sparse_coo; expected float tensors"),
        (giving(lambda i: (X[i].byte(), 1)), r"images are torch\.uint8; .* derived from onehour\.KeyedDataset"),
        (giving(lambda i: (X[i], torch.eye(4)[1])), r"first label: the label is a tensor of shape \(4,\).* its argmax"),
        (giving(lambda i: (X[i], "cat")), "first label: the label is a str"),
        (giving(lambda i: (X[i], None)), "first label: the label is nothing"),
        (giving(lambda i: (X[i], 2.7)), r"first label: the label 2\.7 is not a whole number"),
        (giving(lambda i: (X[i], 1 if i else 2.5)), r"first label: the label 2\.5 is not a whole number"),
        (giving(lambda i: (X[i], "cat" if i else 1)), "last label: the label is a str"),
        (giving(lambda i: {"image": X[i], "label": 1}), r"an \(image, label\) pair: it is a dict of 'image', 'label'"),
        (giving(lambda i: (X[i], 1, i)), r"an \(image, label\) pair: it is a tuple of 3"),
        (giving(lambda i: X[i]), r"an \(image, label\) pair: it is a Tensor"),
        (giving(lambda i: None), r"an \(image, label\) pair: it is a NoneType"),
        (giving(lambda i: (X[i][:, : 8 - i // 63], 1)), r"first image is \(1, 8, 8\) of .*, its last one \(1, 7, 8\)"),
        (giving(lambda i: 1 / 0), r"first item cannot be read: ZeroDivisionError: .*\(.*test_look\.py:\d+\)"),
        (giving(lambda i: sys.exit("bye")), "first look at the training data failed: SystemExit: bye"),
        (giving(killed), r"first look at the training data failed: its process was killed \(SIGKILL\)"),
        (giving(lambda i: os._exit(3)), "first look at the training data failed: its process exited with code 3"),
        (giving(Plain().__getitem__, __len__=lambda self: 64.0), "does not say how many samples it has: TypeError"),
        (giving(Plain().__getitem__, __len__=lambda self: None), "does not say how many samples it has: TypeError"),
        (giving(Plain().__getitem__, __len__=lambda self: -1), "does not say how many samples it has: ValueError"),
        (giving(Plain().__getitem__, __len__=fails), "does not say how many samples it has: RuntimeError: not yet"),
        (giving(Plain().__getitem__, __len__=lambda self: 0), "the training data is empty"),
        (giving(Plain().__getitem__, __len__=lambda self: 80), "last item, 79 of 80, cannot be read: IndexError"),
        ((X, T), r"the training data is two arrays; .*TensorDataset\(images, labels\)"),
        ([X.numpy(), Y], r"the training data is two arrays; .*TensorDataset\(images, labels\)"),
        (DataLoader(Plain()), "the training data is a DataLoader; expected a map-style data set"),
        (Stream(), "the training data is a Stream; expected a map-style data set"),
        ("images", r"an \(image, label\) pair: it is a str"),
        (TensorDataset(X, T, T), r"an \(image, label\) pair: it is a tuple of 3"),
        (TensorDataset(X, torch.eye(4)[T]), r"labels have shape \(64, 4\); expected one whole number a sample"),
        (TensorDataset(X, T + 0.7), r"the training data: label 0 is 0\.7, not a whole number"),
        (TensorDataset(X, T + 0j), r"the training data: labels are torch\.complex64; expected whole numbers"),
        (TensorDataset(X, torch.full((N,), float("inf"))), "the training data: label 0 is inf, not a whole number"),
    ],
)
def test_what_is_wrong_is_one_line(data: Any, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        Data.of(data, data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        Subset([(X[i], 1) for i in range(N)], range(32)),  # type: ignore[arg-type]
        ConcatDataset([Plain(), Plain()]),
        giving(lambda i: [X[i], 1]),
        giving(lambda i: (X[i].requires_grad_(), 1)),
        giving(lambda i: (X[i].transpose(1, 2), 1)),
        giving(Plain().__getitem__, __len__=lambda self: np.int64(N)),
        {i: (X[i], 1) for i in range(N)},
    ],
)
def test_what_is_unusual_and_right_trains(data: Any, tmp_path: Path):
    assert trained(data, tmp_path / "run", loaders=1).finished


@pytest.mark.parametrize("loaders", [0, 1])
@pytest.mark.parametrize(
    ("item", "words"),
    [
        (lambda i: (X[i], 1 if i != 40 else "cat"), r"sample 40: the label is a str \('cat'\)"),
        (lambda i: (X[i] if i != 40 else X[i][:, :4], 1), "sample 40: images of the data differ in shape"),
        (lambda i: (X[i], 1) if i != 40 else None, "sample 40: the item is not an .* pair: it is a NoneType"),
        (lambda i: (X[i], 1, 2)[: 2 + (i == 40)], "sample 40: the item is not an .* pair: it is a tuple of 3"),
        (lambda i: (X[i] if i != 40 else b"", 1), "sample 40: a sample holds what is no tensor: TypeError"),
        (lambda i: (X[i], abs(1 // (i - 40))), "sample 40 of the data cannot be read: ZeroDivisionError"),
    ],
)
def test_what_only_a_later_sample_shows_names_it(item: Any, words: str, loaders: int, tmp_path: Path):
    with pytest.raises(ValueError, match=words):
        trained(giving(item), tmp_path / "run", loaders=loaders)


def test_a_data_set_that_leaves_python_is_one_message_without_loaders_too(tmp_path: Path):
    data = giving(lambda i: sys.exit(0) if i == 40 else (X[i], 1))
    with pytest.raises(ValueError, match="sample 40 of the data cannot be read: SystemExit: 0"):
        trained(data, tmp_path / "run", loaders=0)


def test_images_of_two_types_are_refused():
    with pytest.raises(ValueError, match=r"training images are torch\.float32, validation images torch\.float64"):
        Data.of(Plain(), TensorDataset(X.double(), T))


def test_doubles_name_the_remedy(tmp_path: Path):
    with pytest.raises(ValueError, match=r"images \(1, 8, 8\), torch\.float64: .*; give float32 images, or precision"):
        trained(giving(lambda i: (X[i].double(), 1)), tmp_path / "run")
    assert trained(giving(lambda i: (X[i].double(), 1)), tmp_path / "other", precision="float64").finished


class Offers(KeyedDataset):
    """Bytes, of a key, without [index]."""

    def __len__(self) -> int:
        return N

    def keyed(self, index: int, key: int) -> Any:
        draws = torch.Generator().manual_seed(key)
        return torch.randint(256, (1, 8, 8), dtype=torch.uint8, generator=draws), Y[index]

    def prepare(self, images: Tensor) -> Tensor:
        return images.float() / 255

    def name(self, index: int) -> str:
        return f"record {index}"


def test_what_derives_from_ours_offers_more(tmp_path: Path):
    runs = [trained(Offers(), tmp_path / f"run{loaders}", loaders=loaders) for loaders in (0, 2)]
    assert len({run.summary["state_sha256"] for run in runs}) == 1
    assert Keyed(Offers(), seed=0).name(3) == "sample 3 (record 3)"


def test_one_that_only_prepares_is_read_by_index_and_seeded(tmp_path: Path):
    class Prepares(KeyedDataset):
        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            return torch.randint(256, (1, 8, 8), dtype=torch.uint8), int(Y[index])

        def prepare(self, images: Tensor) -> Tensor:
            return images.float() / 255

    runs = [trained(Prepares(), tmp_path / f"run{loaders}", loaders=loaders) for loaders in (0, 2)]
    assert len({run.summary["state_sha256"] for run in runs}) == 1

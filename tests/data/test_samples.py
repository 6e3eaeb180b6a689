"""Samples of any form become batches, which are copied to a device as networks want them."""

from collections import UserDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from onehour.data.loader import moved
from onehour.data.samples import Form, Keyed, collate, mapped

CPU = torch.device("cpu")


class Pair(NamedTuple):
    image: Tensor
    size: tuple[int, float]


def image(index: int) -> Tensor:
    """(3, 4, 6)."""
    return (torch.arange(72, dtype=torch.uint8).view(3, 4, 6) * 3 + index).to(torch.uint8)


def sample(index: int) -> Any:
    pair = Pair(image(index), (index, index / 3))
    return {"pair": pair, "mask": np.full((2, 2), index), "words": ["a", f"{index}"], "flag": index % 2 == 0}


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_same(list(one.values()), list(other.values()))
    elif isinstance(one, tuple | list):
        assert isinstance(other, tuple | list)  # torch makes lists of tuples
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_trees_are_collated_as_torch_does():
    samples = [sample(index) for index in range(5)]
    ours, torchs = collate(samples), default_collate(samples)
    assert ours.pop("words") == [["a"] * 5, [f"{index}" for index in range(5)]]
    del torchs["words"]  # in tuples
    assert_same(ours, torchs)


@pytest.mark.parametrize("together", [False, True])
def test_images_keep_their_order_in_memory_until_they_are_copied(together: bool):
    images = [image(index).permute(1, 2, 0).contiguous().permute(2, 0, 1) for index in range(5)]
    batch = collate(images if together else [image(index) for index in range(5)])
    assert batch.permute(0, 2, 3, 1).is_contiguous() == together
    assert torch.equal(batch, torch.stack(images))
    copy = moved(batch, CPU)
    assert copy.is_contiguous()
    assert torch.equal(copy, batch)
    assert copy.data_ptr() != batch.data_ptr()
    assert moved("text", CPU) == "text"


def test_a_batch_is_copied_to_a_device_from_pinned_memory_that_nobody_else_writes_to(monkeypatch: pytest.MonkeyPatch):
    """As far as that can be seen without a GPU: its memory may be filled anew while the copy is under way."""
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self.clone()) or pinned[-1])
    batch = torch.stack([image(index).permute(1, 2, 0) for index in range(5)]).permute(0, 3, 1, 2)
    there = moved(batch, torch.device("meta"))
    assert torch.equal(pinned[0].permute(0, 3, 1, 2), batch)
    assert pinned[0].is_contiguous()
    assert pinned[0].data_ptr() != batch.data_ptr()
    assert (there.shape, there.is_contiguous(memory_format=torch.channels_last)) == ((5, 3, 4, 6), True)


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([torch.zeros(2), torch.zeros(3)], r"differ \(\(2,\) of torch.float32 and \(3,\) of torch.float32\)"),
        ([torch.zeros(2), torch.zeros(2).double()], "float32 and .* of torch.float64"),
        ([object(), object()], "a sample holds a object; expected tensors, numbers and texts"),
        ([None], "a sample holds a NoneType"),
        ([{"y": 0}, {"y": 0.5}], "float64"),  # which the first one would have cut to 0
        ([True, 3], "torch.bool and .* of torch.int64"),
        ([0.5, np.float32(0.5)], "float64 and .* of torch.float32"),
        ([1, None], "differ \\(int and NoneType\\)"),
        (["a", None], "differ \\(str and NoneType\\)"),
        ([(1, 2), (1,)], "2 and 1 parts"),
        ([{"a": 1}, {"a": 2, "b": 3}], "not all have 'b'"),
        ([{"a": 1, "b": 3}, {"a": 2}], "not all have 'b'"),
        ([1, 2**70], "does not fit into torch.int64"),
    ],
)
def test_what_cannot_be_put_side_by_side_is_one_message(samples: list[Any], said: str):
    with pytest.raises(ValueError, match=said):
        collate(samples)


def test_numbers_of_one_type_may_be_pythons_and_others():
    assert collate([0.5, np.float64(2)]).tolist() == collate([np.float64(0.5), 2.0]).tolist() == [0.5, 2.0]
    assert collate([1, torch.tensor(2)]).dtype == torch.int64


def test_the_sample_that_differs_is_named():
    samples = [{"a": 1.0, "b": 2}, {"a": 1.0, "b": 2}, {"a": 1.0}]
    keyed = Keyed(samples, 0, form=Form(own=True), side="training")
    with pytest.raises(ValueError, match=r"^training sample 2 beside sample 1: .*not all have 'b'"):
        keyed.batch([(0, 1, 0), (0, 0, 1), (0, 2, 2), (0, 0, 3)])


def test_a_function_of_all_leaves_keeps_the_form():
    tree = {"pair": Pair(torch.ones(2), (1, 2.0)), "words": ["a", None]}
    found = mapped(tree, lambda leaf: [leaf])
    assert found["pair"].size == ([1], [2.0])
    assert found["words"] == [["a"], [None]]


def test_what_wraps_a_dict_is_walked_and_kept_as_it_is():
    tree = UserDict({"x": (1, 2)})
    found = mapped(tree, lambda leaf: -leaf)
    assert type(found) is UserDict
    assert (found["x"], tree["x"]) == ((-1, -2), (1, 2))

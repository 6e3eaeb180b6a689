"""Labels as data sets give them."""

import enum
from fractions import Fraction

import numpy as np
import pytest
import torch

from onehour.data.labels import as_label


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
        (2.7, "the label 2.7 is no whole number"),
        (np.float32("nan"), "the label nan is no whole number"),
        (torch.tensor(float("inf")), "the label inf is no whole number"),
        (1j, "the label 1j is no whole number"),
        (torch.tensor(1j), "the label 1j is no whole number"),
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

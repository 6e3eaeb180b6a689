"""Files of tensors, written without a copy, read by safetensors itself."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from onehour.train.snapshot import Snapshot
from onehour.train.tensorfile import TYPES, write_bytes, write_tensors


@pytest.mark.parametrize("dtype", list(TYPES))
def test_every_type_is_read_back_as_it_was(dtype: torch.dtype, tmp_path: Path):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    write_tensors(tmp_path / "a", Snapshot({"a/ä": tensor}))
    read = load_file(tmp_path / "a")["a/ä"]
    assert read.dtype == dtype
    assert torch.equal(read, tensor)


def test_shapes_sizes_and_mixed_types_are_kept(tmp_path: Path):
    state: dict[str, Tensor] = {
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "weight": torch.randn(5, 3, 1),
        "half": torch.randn(3).bfloat16(),
    }
    said = write_tensors(tmp_path / "a", Snapshot(state))
    read = load_file(tmp_path / "a")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
    content = (tmp_path / "a").read_bytes()
    assert said == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "finite": True}


def test_no_tensors_are_a_file_too(tmp_path: Path):
    write_tensors(tmp_path / "a", Snapshot({}))
    assert load_file(tmp_path / "a") == {}


def test_bytes_have_their_digest(tmp_path: Path):
    assert write_bytes(tmp_path / "a", b"abc")["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert (tmp_path / "a").read_bytes() == b"abc"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_said(value: float, tmp_path: Path):
    said = write_tensors(tmp_path / "a", Snapshot({"a": torch.zeros(2), "b": torch.tensor([0.0, value])}))
    assert said["finite"] is False

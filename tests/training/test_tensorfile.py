"""Files of tensors, written without a copy, read by safetensors itself."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from onehour.training.snapshot import Snapshot
from onehour.training.tensorfile import TYPES, write_bytes, write_tensors


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_not_finite_is_said(value: float, dtype: torch.dtype, tmp_path: Path):
    """Wherever it is, and however large the others are."""
    tensor = torch.full((2**20 + 3,), torch.finfo(dtype).max, dtype=dtype)
    state = {"a": torch.zeros(2), "b": tensor, "c": torch.tensor(True)}
    for place in (0, 2**19 + 5, -1):
        assert write_tensors(tmp_path / f"finite {place}", Snapshot(state))["finite"] is True
        tensor[place] = value
        assert write_tensors(tmp_path / f"{place}", Snapshot(state))["finite"] is False
        tensor[place] = -torch.finfo(dtype).max


def test_a_large_tensor_is_written_in_pieces_and_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However little the system takes at once."""
    real, sizes = os.write, []

    def some(descriptor: int, part: memoryview) -> int:
        sizes.append(len(part))
        return real(descriptor, part[: max(1, len(part) // 2)])

    tensor = torch.arange(3_000_001, dtype=torch.float32)
    monkeypatch.setattr(os, "write", some)
    said = write_tensors(tmp_path / "a", Snapshot({"a": tensor}))
    assert torch.equal(load_file(tmp_path / "a")["a"], tensor)
    assert said["sha256"] == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert max(sizes) == 2**22


def test_a_file_is_new_and_no_link_leads_it_elsewhere(tmp_path: Path):
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            write_bytes(tmp_path / name, b"abc")
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_a_type_that_the_format_has_not_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"wave is torch\.complex64"):
        write_tensors(tmp_path / "a", Snapshot({"wave": torch.zeros(2, dtype=torch.complex64)}))

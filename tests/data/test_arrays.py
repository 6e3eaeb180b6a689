"""A file of arrays is read back whole, by anyone, or refused in one message; never half believed."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from onehour.data.arrays import open_arrays, write_arrays

ARRAYS = {
    "labels": np.array([0, 0, 1], np.int32),
    "names": np.frombuffer("a.jpgbé".encode(), np.uint8),
    "ends": np.arange(4, dtype=np.int64),
    "checks": np.array([2**32 - 1, 0, 5], np.uint32),
    "none": np.zeros(0, np.int64),
}
ABOUT = {"kind": "folder", "classes": ["cat", "\udcff <é>"], "stamps": [1, None]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.index"
    write_arrays(path, ARRAYS, ABOUT)
    return path


def test_what_was_written_is_read(file: Path):
    for verify in (True, False):
        arrays, about = open_arrays(file, verify=verify)
        assert about == ABOUT
        assert sorted(arrays) == sorted(ARRAYS)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, ARRAYS[name])
            assert array.dtype == ARRAYS[name].dtype
            assert not array.flags.writeable
            assert array.flags.aligned


def test_others_read_it_too(file: Path):
    for name, array in load_file(file).items():
        np.testing.assert_array_equal(array, ARRAYS[name])


def test_the_same_content_is_the_same_file(file: Path, tmp_path: Path):
    write_arrays(tmp_path / "b.index", dict(reversed(ARRAYS.items())), ABOUT)
    assert (tmp_path / "b.index").read_bytes() == file.read_bytes()


def test_nothing_else_is_left_beside_it(file: Path):
    assert [path.name for path in file.parent.iterdir()] == ["a.index"]


def test_an_open_file_may_be_replaced(file: Path):
    """A running job keeps the arrays that it has read, also where the file is cut short in its place."""
    arrays, _ = open_arrays(file)
    write_arrays(file, {name: array[:0] for name, array in ARRAYS.items()}, ABOUT)
    arrays["labels"].sum()
    again, _ = open_arrays(file)
    os.truncate(file, 0)
    assert again["labels"].sum() == 0
    np.testing.assert_array_equal(arrays["labels"], ARRAYS["labels"])


def test_a_flipped_bit_is_found_or_changes_nothing(file: Path):
    data, draw, found = file.read_bytes(), random.Random(0), 0
    said: set[str] = set()
    for place in {draw.randrange(len(data)) for _ in range(400)}:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            arrays, about = open_arrays(file)
        except ValueError as error:
            said.add(str(error))
            found += 1
        else:  # as one letter's case in \udcff
            assert about == ABOUT
            assert all((arrays[name] == array).all() for name, array in ARRAYS.items())
    assert found > 200
    assert said == {
        f"{file} is damaged: its SHA-256 is not the one that it was written with; make it again",
        f"{file} is no index of onehour, or a damaged one; make it again",
    }


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 400))
def test_any_cut_is_found(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = tmp_path_factory.mktemp("cut") / "a.index"
    write_arrays(path, ARRAYS, ABOUT)
    data = path.read_bytes()
    path.write_bytes(data[: min(cut, len(data) - 1)])
    with pytest.raises(ValueError, match="is no index of onehour, or a damaged one; make it again"):
        open_arrays(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0" + b"{" * 16])
def test_other_files_are_no_index(tmp_path: Path, content: bytes):
    (tmp_path / "a.index").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.index is no index of onehour"):
        open_arrays(tmp_path / "a.index")


def test_other_safetensors_are_no_index(tmp_path: Path):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "a.index")
    with pytest.raises(ValueError, match=r"a\.index is no index of onehour"):
        open_arrays(tmp_path / "a.index")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "a.index", metadata={"onehour": "[1]"})
    with pytest.raises(ValueError, match=r"a\.index is no index of onehour"):
        open_arrays(tmp_path / "a.index")


def test_a_folder_is_one_message(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        open_arrays(tmp_path)

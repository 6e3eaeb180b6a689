"""An index: whole or refused, opened without reading the folder, and no change of the folder passes unseen."""

import os
import random
import re
import shutil
import zlib
from pathlib import Path

import images
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from onehour.data.images import image_folder, open_sides
from onehour.data.index import INDEX, index_of, open_arrays, write_arrays, write_index
from onehour.data.sources import load_data

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
    arrays, about = open_arrays(file)
    assert about == ABOUT
    assert sorted(arrays) == sorted(ARRAYS)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.dtype == ARRAYS[name].dtype
        assert not array.flags.writeable
        assert array.flags.aligned


def test_the_same_content_is_the_same_file_and_others_read_it_too(file: Path, tmp_path: Path):
    for name, array in load_file(file).items():
        np.testing.assert_array_equal(array, ARRAYS[name])
    write_arrays(tmp_path / "b.index", dict(reversed(ARRAYS.items())), ABOUT)
    assert (tmp_path / "b.index").read_bytes() == file.read_bytes()


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
        f"{file} is not an index of onehour, or is damaged; make it again",
    }


@settings(max_examples=60)
@given(cut=st.integers(0, 400))
def test_any_cut_is_found(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = tmp_path_factory.mktemp("cut") / "a.index"
    write_arrays(path, ARRAYS, ABOUT)
    data = path.read_bytes()
    path.write_bytes(data[: min(cut, len(data) - 1)])
    with pytest.raises(ValueError, match="is not an index of onehour, or is damaged; make it again"):
        open_arrays(path)


WEIGHT = {"weight": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"hello", b"\xff" * 64, b"\x10\0\0\0\0\0\0\0" + b"{" * 16, b"\2\0\0\0\0\0\0\0[]"),
        *(save(WEIGHT), save(WEIGHT, metadata={"onehour": "[1]"})),
    ],
)
def test_other_files_are_no_index(tmp_path: Path, content: bytes):
    (tmp_path / "a.index").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.index is not an index of onehour"):
        open_arrays(tmp_path / "a.index")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        open_arrays(tmp_path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return images.tree(tmp_path / "data")


def contents(root: Path) -> list[tuple[str, str, bytes, int]]:
    """Every image of a source: where, in which class, its bytes and its label."""
    return [
        (source.name(index), source.classes[source.labels[index]], source.read(index), int(source.labels[index]))
        for source in open_sides(root).values()
        for index in range(len(source.labels))
    ]


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_index_gives_what_the_folder_gives(tree: Path, digests: bool, jobs: int):
    listed = contents(tree)
    counted: list[int] = []
    assert write_index(tree, digests=digests, jobs=jobs, done=counted.append) == tree / INDEX
    assert sum(counted) == 6 + (len(listed) if digests else 0)
    assert contents(tree) == contents(tree / INDEX) == listed
    assert load_data(str(tree / INDEX)).classes == 3


def test_an_indexed_folder_is_not_listed(tree: Path, monkeypatch: pytest.MonkeyPatch):
    write_index(tree)
    real, listed = os.scandir, []
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or real(path))
    image_folder(tree)
    assert len(listed) == 2  # each side's classes, for their times


def test_an_index_may_lie_elsewhere_and_one_inside_moves_with_its_folder(tree: Path, tmp_path: Path):
    path = write_index(tree, tmp_path / "mine.index")
    assert not (tree / INDEX).exists()
    assert contents(path) == contents(tree)
    write_index(tree)
    before = [content[1:] for content in contents(tree)]
    tree.rename(tmp_path / "moved")
    assert [content[1:] for content in contents(tmp_path / "moved")] == before


def test_a_copy_whose_folders_have_other_times_is_still_the_same(tree: Path, tmp_path: Path):
    write_index(tree)
    shutil.copytree(tree, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "train" / "cat", (1, 1))
    assert len(contents(tmp_path / "copy")) == 30


CHANGES = {
    "a new file": lambda tree: (tree / "train/dog/new.jpg").write_bytes(b"x"),
    "a file gone": lambda tree: (tree / "val/dog/0001.JPEG").unlink(),
    "a renamed file": lambda tree: (tree / "train/dog/0001.JPEG").rename(tree / "train/dog/1.JPEG"),
    "a moved file": lambda tree: (tree / "train/dog/0001.JPEG").rename(tree / "train/cat/1.JPEG"),
    "a new class": lambda tree: [(tree / side / "cow").mkdir() for side in ("train", "val")],
    "a class gone": lambda tree: shutil.rmtree(tree / "train/dog"),
    "a side gone": lambda tree: (tree / "val").rename(tree / "away"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(tree: Path, change: str):
    write_index(tree)
    CHANGES[change](tree)
    with pytest.raises(ValueError, match=rf"{INDEX} is out of date: .*(index the data again|came after)") as raised:
        image_folder(tree)
    assert "\n" not in str(raised.value)
    if change in ("a new file", "a file gone", "a renamed file", "a moved file"):
        write_index(tree)
        image_folder(tree)


def test_every_change_at_once_is_counted(tree: Path):
    write_index(tree)
    for number in range(4):
        (tree / "train" / "cat" / f"new{number}.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cat/new0\.jpg came after the data was indexed; .* and 3 more changes$"):
        image_folder(tree)


def test_a_change_right_after_indexing_is_noticed(tree: Path):
    """Also where the file system's clock has not moved since the folder was made."""
    for number in range(20):
        (tree / "train" / "cat" / f"{number}.jpg").write_bytes(b"x")
        write_index(tree)
        (tree / "train" / "cat" / f"{number}.jpg").rename(tree / "train" / "cat" / f"{number}_.jpg")
        with pytest.raises(ValueError, match="out of date"):
            image_folder(tree)


def test_what_is_no_image_may_come_and_go(tree: Path):
    write_index(tree)
    (tree / "train" / "dog" / ".DS_Store").write_bytes(b"x")
    (tree / "README").write_text("x")
    image_folder(tree)


def test_a_file_that_changed_its_size_is_noticed_when_it_is_read(tree: Path):
    write_index(tree)
    with (tree / "train" / "cat" / "0000.JPEG").open("ab") as file:
        file.write(b"more")
    train, _ = image_folder(tree)
    said = r"cat/0000\.JPEG has \d+ bytes, \d+ when it was indexed; restore it, or index"
    with pytest.raises(ValueError, match=said):
        train.keyed(0, 0)


def test_a_silently_wrong_file_is_noticed_with_digests(tree: Path):
    path = tree / "train" / "cat" / "0000.JPEG"
    right = path.read_bytes()
    for digests, noticed in ((False, False), (True, True)):
        path.write_bytes(right)
        write_index(tree, digests=digests)
        path.write_bytes(images.flipped(right))
        train, _ = image_folder(tree)
        if noticed:
            said = r"cat/0000\.JPEG has other bytes than when it was indexed: its CRC-32"
            with pytest.raises(ValueError, match=said):
                train.keyed(0, 0)
        else:
            train.keyed(0, 0)


def test_digests_are_the_usual_crc(tree: Path):
    arrays, _ = open_arrays(write_index(tree, digests=True))
    files = [path for side in ("train",) for path in sorted((tree / side).glob("*/*"))]
    assert arrays["train.checks"].tolist() == [zlib.crc32(path.read_bytes()) for path in files]


@pytest.mark.parametrize("place", ["folder", "nowhere.index", "nowhere"])
def test_what_is_not_there_is_one_message(tmp_path: Path, place: str):
    with pytest.raises(ValueError, match=rf"^there is no (folder|index) {re.escape(str(tmp_path / place))}"):
        image_folder(tmp_path / place)
    with pytest.raises(ValueError, match="there is no folder"):
        write_index(tmp_path / place)


def test_a_sound_folder_is_asked_for_and_a_place_that_can_be_written(tree: Path):
    said = r"nowhere/a\.index cannot be written: No such file or directory; name another"
    with pytest.raises(ValueError, match=said):
        write_index(tree, tree / "nowhere" / "a.index")
    (tree / "train" / "cat" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt is not named like an image file"):
        write_index(tree)
    assert not (tree / INDEX).exists()


def test_a_file_that_cannot_be_read_stops_digests(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onehour.data.listing.LARGEST", 10)
    with pytest.raises(ValueError, match=r"cat/0000\.JPEG has \d+ bytes, too many for an image; .* \(23 more; "):
        write_index(tree, digests=True)


def test_which_index_a_path_means(tree: Path):
    assert index_of(tree) is None
    write_index(tree)
    assert index_of(tree) == index_of(tree / INDEX) == tree / INDEX
    assert index_of(tree / "train") is None


def rewritten(path: Path, arrays: dict[str, np.ndarray], about: dict[str, object]) -> None:
    """The index with other arrays and words, and a digest that fits them."""
    old_arrays, old_about = open_arrays(path)
    write_arrays(path, {**{name: array.copy() for name, array in old_arrays.items()}, **arrays}, {**old_about, **about})


WRONG = {
    "another version": ({}, {"format": 2}),
    "another kind": ({}, {"kind": "table"}),
    "no classes": ({}, {"classes": None}),
    "classes that are no names": ({}, {"classes": [1, 2, 3]}),
    "a class that leads elsewhere": ({}, {"classes": ["..", "dog", "é x"]}),
    "an absolute class": ({}, {"classes": ["/etc", "dog", "é x"]}),
    "too few classes": ({}, {"classes": ["cat"]}),
    "no stamps": ({}, {"stamps": {}}),
    "stamps of another form": ({}, {"stamps": {"train": 5, "val": 6}}),
    "labels out of range": ({"train.labels": np.full(24, 7, np.int32)}, {}),
    "labels below zero": ({"train.labels": np.full(24, -1, np.int32)}, {}),
    "labels out of order": ({"train.labels": np.arange(24, dtype=np.int32)[::-1] // 8}, {}),
    "too few labels": ({"train.labels": np.zeros(3, np.int32)}, {}),
    "names that lead elsewhere": ({"train.names": np.frombuffer(b"../passwd" * 24, np.uint8)}, {}),
    "names cut short": ({"train.names": np.zeros(3, np.uint8)}, {}),
    "sizes below zero": ({"train.sizes": np.full(24, -1, np.int64)}, {}),
    "too few sizes": ({"train.sizes": np.zeros(3, np.int64)}, {}),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_an_index_that_no_listing_would_have_is_refused(tree: Path, wrong: str):
    write_index(tree)
    rewritten(tree / INDEX, *WRONG[wrong])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tree / INDEX))} (is|names) .*; make it again$"):
        image_folder(tree)

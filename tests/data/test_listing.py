"""What lies in a folder is listed in order, and everything that is wrong with it is said."""

import os
from pathlib import Path

import images
import numpy as np
import pytest

from onehour.data.dataset import FaultError
from onehour.data.listing import Names, Table, list_sides, read_file, refuse


def faults(root: Path) -> list[str]:
    found: list[FaultError] = []
    list_sides(root, found)
    return [str(fault).replace(f"{root}/", "") for fault in found]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return images.tree(tmp_path, train=3, val=1)


def test_files_come_in_the_order_of_names_with_their_sizes(tree: Path):
    told: list[int] = []
    faults: list[FaultError] = []
    table = list_sides(tree, faults, sizes=True, done=told.append)["train"]
    assert faults == []
    expected = [f"{name}/{file:04d}.JPEG" for name in sorted(images.CLASSES) for file in range(3)]
    assert [table.where(index) for index in range(len(table))] == expected
    assert table.sizes is not None
    assert table.sizes.tolist() == [(tree / "train" / where).stat().st_size for where in expected]
    assert table.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert told == [1] * 6
    assert list_sides(tree, faults)["train"].sizes is None


def test_every_kind_of_wrong_entry_is_named(tree: Path):
    cat = tree / "train" / "cat"
    (cat / "notes.txt").write_text("x")
    (cat / "inner").mkdir()
    (cat / "nowhere.jpg").symlink_to("gone")
    (cat / "circle.jpg").symlink_to("circle.jpg")
    (cat / "up").symlink_to("..")
    os.mkfifo(cat / "pipe.jpg")
    assert sorted(faults(tree)) == [
        "train/cat/circle.jpg is a link that cannot be followed (Too many levels of symbolic links), where images are"
        " expected; restore it, or move it elsewhere",
        "train/cat/inner is a folder, where images are expected; restore it, or move it elsewhere",
        "train/cat/notes.txt is not named like an image file; move it out of the class's folder",
        "train/cat/nowhere.jpg is a link that cannot be followed (No such file or directory), where images are"
        " expected; restore it, or move it elsewhere",
        "train/cat/pipe.jpg is not a regular file, where images are expected; restore it, or move it elsewhere",
        "train/cat/up is a folder, where images are expected; restore it, or move it elsewhere",
    ]


def test_an_image_beside_the_classes_is_a_fault_and_other_files_a_note(tree: Path):
    (tree / "train" / "stray.jpg").write_bytes(b"x")
    (tree / "train" / "README").write_text("x")
    (tree / "val" / ".DS_Store").write_text("x")
    found: list[FaultError] = []
    list_sides(tree, found)
    assert {Path(fault.path).name: fault.note for fault in found} == {"stray.jpg": False, "README": True}
    said = r"stray\.jpg is a file beside the class folders, where nothing is read; move it"
    with pytest.raises(ValueError, match=said):
        refuse(found, tree)
    refuse([fault for fault in found if fault.note], tree)


def test_a_missing_side_and_other_faults_are_said_together(tree: Path):
    (tree / "val").rename(tree / "validation")
    (tree / "train" / "cow").mkdir()
    assert faults(tree) == [
        "train/cow holds no images; add some, or remove the folder here and in its counterpart",
        "val is not a folder; expected train/CLASS/* and val/CLASS/*, or --validation 0.1 to divide one folder",
    ]


def test_a_folder_that_may_not_be_listed_is_one_fault(tree: Path, monkeypatch: pytest.MonkeyPatch):
    """For a user who may read everything too."""
    real = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for side in ("train", "val"):
        (tree / side / "closed").mkdir()
    assert faults(tree) == [
        "train/closed cannot be listed: Permission denied; make it readable",
        "val/closed cannot be listed: Permission denied; make it readable",
    ]


def test_a_pipe_in_a_files_place_does_not_hang_and_what_is_larger_than_any_image_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "a.jpg")
    with (tmp_path / "b.jpg").open("wb") as file:
        file.truncate(2**40)
    said = {"a.jpg": "is not a regular file", "": "is not a regular file", "b.jpg": "has 1,099,511,627,776 bytes, too"}
    for name, problem in said.items():
        with pytest.raises(FaultError, match=f"{name} {problem}"):
            read_file(str(tmp_path / name))


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\0"])
def test_names_that_lead_elsewhere_are_not_safe(name: str):
    assert not Names.of(["a.jpg", name]).safe()
    assert Names.of(["a.jpg", "é", "...", os.fsdecode(b"\xff")]).safe()


def test_names_whose_ends_do_not_fit_are_not_safe():
    buffer = np.frombuffer(b"abc", np.uint8)
    for ends in ([], [0, 2], [1, 3], [0, 2, 1, 3], [0, 4]):
        assert not Names(buffer, np.array(ends, np.int64)).safe()


def test_a_table_knows_its_files_bytes():
    table = Table(
        ["cat"], np.zeros(2, np.int32), Names.of(["1", "2"]), np.array([3, 3]), np.array([891568578, 5], np.uint32)
    )
    assert table.verify(0, b"abc", table.where) == b"abc"
    said = r"^cat/2 has other bytes than when it was indexed: its CRC-32 differs; restore"
    with pytest.raises(FaultError, match=said):
        table.verify(1, b"abc", table.where)
    with pytest.raises(FaultError, match=r"^cat/1 has 2 bytes, 3 when it was indexed; restore it"):
        table.verify(0, b"ab", table.where)


def test_classes_that_differ_in_their_unicode_form_alone_are_the_same(tree: Path):
    """One letter, or a letter and its accent: systems and archives differ in which they write."""
    for side, spelled in (("train", "\u00e9"), ("val", "e\u0301")):
        (tree / side / spelled).mkdir()
        (tree / side / "fa").mkdir()
        for name in (spelled, "fa"):
            (tree / side / name / "1.jpg").write_bytes(b"x")
    faults: list[FaultError] = []
    tables = list_sides(tree, faults)
    assert faults == []
    classes = tables["train"].classes
    assert classes == sorted(classes)  # as before: no label of a run changes
    assert tables["val"].classes == ["e\u0301" if name == "\u00e9" else name for name in classes]
    for side, table in tables.items():
        assert {table.where(place).split("/")[0] for place in range(len(table))} == set(table.classes)
        assert (tree / side / table.where(0)).exists()


def test_two_classes_of_one_name_in_unicode_are_named(tree: Path):
    for spelled in ("\u00e9", "e\u0301"):
        for side in ("train", "val"):
            (tree / side / spelled).mkdir()
            (tree / side / spelled / "1.jpg").write_bytes(b"x")
    faults: list[FaultError] = []
    list_sides(tree, faults)
    with pytest.raises(ValueError, match=r"both are one name in Unicode; move .* \(1 more"):
        refuse(faults, tree)

"""The doctor finds everything that was planted in one pass, each with its path and a remedy, and nothing else."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import images
import numpy as np
import pytest
from PIL import Image

from onehour.cli.data import add_data
from onehour.data.doctor import examine
from onehour.data.images import open_sides
from onehour.data.index import INDEX, write_index
from onehour.data.pack import pack

HTML = b"<!DOCTYPE html><title>404 Not Found</title>"


def files() -> dict[str, tuple[bytes, str]]:
    """What is wrong from the start: path, content, what the doctor says."""
    jpeg = images.saved(images.picture(90, (64, 48)), "JPEG", quality=90)
    png = images.saved(images.picture(91), "PNG")
    frames = [images.picture(seed) for seed in (92, 93)]
    numbers = np.full((9, 9), 70_000, np.int32)
    return {
        "train/cat/empty.jpg": (b"", "is an empty file"),
        "train/cat/cut.jpg": (jpeg[:-400], "cannot be decoded: image file is truncated"),
        "train/cat/half.png": (png[: len(png) // 2], "cannot be decoded"),
        "train/cat/page.jpg": (HTML, "is not a readable image"),
        "train/cat/bomb.png": (images.bomb(), "has 13300×13300 pixels, more than the cap"),
        "train/cat/float.tif": (
            images.saved(Image.fromarray(np.ones((9, 9), np.float32)), "TIFF"),
            "cannot be decoded: its pixels are floating-point numbers",
        ),
        "train/cat/wide.tif": (images.saved(Image.fromarray(numbers), "TIFF"), "cannot be decoded: its values reach"),
        "train/cat/flipped.png": (png[:60] + bytes([png[60] ^ 4]) + png[61:], "cannot be decoded"),
        "train/cat/is-png.jpg": (png, "note: is PNG by its content"),
        "train/cat/dot.png": (images.saved(images.picture(94, (1, 1)), "PNG"), "note: has 1×1 pixels"),
        "train/cat/line.png": (images.saved(images.picture(95, (1, 10_000)), "PNG"), "note: has 1×10000 pixels"),
        "train/cat/moves.gif": (
            images.saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            "note: has 2 frames",
        ),
        "train/cat/gap.jpg": (jpeg[:-60] + jpeg[-2:], "note: is damaged, and decoded as far as it goes: Corrupt JPEG"),
    }


def twins(tree: Path) -> dict[str, tuple[str, str]]:
    """Files with the bytes of another: path, the other, what the doctor says."""
    return {
        "train/cat/zz.JPEG": ("train/cat/0005.JPEG", f"note: has the same bytes as {tree}/train/cat/0005.JPEG, too"),
        "train/dog/zz.JPEG": (
            "train/cat/0004.JPEG",
            f"note: has the same bytes as {tree}/train/cat/0004.JPEG, in another",
        ),
        "val/dog/zz.JPEG": (
            "train/dog/0003.JPEG",
            f"note: has the same bytes as {tree}/train/dog/0003.JPEG, to train and",
        ),
    }


LATER: dict[str, tuple[Callable[[Path], object], str]] = {
    "train/dog/0000.JPEG": (lambda path: path.write_bytes(images.flipped(path.read_bytes())), "has other bytes"),
    "train/dog/0001.JPEG": (lambda path: path.write_bytes(b"x" + path.read_bytes()), "when it was indexed"),
    "train/dog/0002.JPEG": (lambda path: path.unlink(), "is in the index but missing"),
    "train/dog/new.png": (
        lambda path: path.write_bytes(images.saved(images.picture(99), "PNG")),
        "came after the data was indexed",
    ),
    "train/dog/notes.txt": (lambda path: path.write_text("x"), "is not named like an image file"),
    "train/dog/folder": (lambda path: path.mkdir(), "is a folder, where images are expected"),
    "train/dog/nowhere.jpg": (lambda path: path.symlink_to("gone"), "(No such file or directory), where images"),
    "train/dog/circle.jpg": (lambda path: path.symlink_to("circle.jpg"), "(Too many levels of symbolic links)"),
    "train/dog/pipe.jpg": (lambda path: os.mkfifo(path), "is not a regular file, where images are expected"),
    "train/stray.jpg": (lambda path: path.write_bytes(b"x"), "is a file beside the class folders"),
    "train/README": (lambda path: path.write_text("x"), "note: is a file beside the class folders"),
    "train/cow": (lambda path: path.mkdir(), "holds no images"),
    "train/cow ": (lambda path: None, "is a class that the index does not have"),
    "val": (lambda path: None, "lacks 'cow'"),
}
"""What happened after the data was indexed: path, what, what the doctor says of it."""


@pytest.fixture
def planted(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A tree with everything that can be wrong, and what should be said of which path."""
    tree = images.tree(tmp_path / "data", train=6)
    said: dict[str, str] = {}
    for name, (content, problem) in files().items():
        (tree / name).write_bytes(content)
        said[name] = problem
    for name, (other, problem) in twins(tree).items():
        (tree / name).write_bytes((tree / other).read_bytes())
        said[name] = problem
    write_index(tree, digests=True)
    for name, (happens, problem) in LATER.items():
        happens(tree / name)
        said[name] = problem
    return tree, said


@pytest.mark.parametrize("jobs", [1, 2])
def test_everything_planted_is_found_in_one_pass_and_nothing_else(planted: tuple[Path, dict[str, str]], jobs: int):
    tree, said = planted
    assert len(said) == 30
    counted: list[int] = []
    faults = examine(tree, jobs=jobs, done=counted.append)
    found = sorted((str(Path(fault.path).relative_to(tree)), str(fault)) for fault in faults)
    for name, problem in said.items():
        note, problem = problem.startswith("note: "), problem.removeprefix("note: ")
        matching = [fault for fault in faults if fault.path == str(tree / name.strip()) and problem in fault.problem]
        assert len(matching) == 1, (name, found)
        assert matching[0].note == note
        assert matching[0].remedy
    assert len(faults) == len(said), found
    assert all("\n" not in str(fault) for fault in faults)
    assert sum(counted) > 30


def test_a_file_that_may_not_be_read_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """For a user who may read everything too."""
    tree, real = images.tree(tmp_path / "data"), os.open

    def refusing(path: str, *rest: int) -> int:
        if str(path).endswith("cat/0003.JPEG"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refusing)
    (fault,) = examine(tree)
    assert str(fault) == f"{tree}/train/cat/0003.JPEG cannot be read: Permission denied; restore or remove it"


def test_a_sound_tree_and_its_index_are_sound(tmp_path: Path):
    tree = images.tree(tmp_path / "data")
    assert examine(tree) == []
    write_index(tree, digests=True)
    assert examine(tree) == examine(tree / INDEX) == []


def test_a_damaged_index_is_named_and_the_folder_examined_all_the_same(tmp_path: Path):
    tree = images.tree(tmp_path / "data")
    write_index(tree)
    (tree / INDEX).write_bytes(b"hello")
    (tree / "val" / "dog" / "0000.JPEG").write_bytes(b"")
    assert [fault.path for fault in examine(tree)] == [str(tree / INDEX), str(tree / "val" / "dog" / "0000.JPEG")]


def test_the_cap_can_be_another(tmp_path: Path):
    tree = images.tree(tmp_path / "data")
    assert len(examine(tree, pixels=100)) == 30


def doctor(path: Path, *options: str) -> int:
    """`onehour data doctor` as the command line calls it."""
    parser = argparse.ArgumentParser()
    add_data(parser.add_subparsers())
    parsed = parser.parse_args(["data", "doctor", str(path), "--jobs", "1", *options])
    return parsed.command(parsed, [])


def test_the_command_prints_a_line_each_and_leaves_with_1(
    planted: tuple[Path, dict[str, str]], capsys: pytest.CaptureFixture[str]
):
    tree, said = planted
    assert doctor(tree) == 1
    lines = capsys.readouterr().out.splitlines()
    notes = sum(problem.startswith("note: ") for problem in said.values())
    assert len(lines) == len(said) + 1
    assert sum(line.startswith("note: ") for line in lines) == notes
    assert lines[-1] == f"{tree}: {len(said) - notes} faults, {notes} notes"
    assert doctor(tree, "--json") == 1
    assert {fault["path"] for fault in json.loads(capsys.readouterr().out)} == {str(tree / n.strip()) for n in said}


def test_notes_alone_leave_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tree = images.tree(tmp_path / "data")
    assert doctor(tree) == 0
    assert capsys.readouterr().out == f"{tree}: nothing found\n"
    (tree / "train" / "README").write_text("x")
    assert doctor(tree) == 0
    assert capsys.readouterr().out.endswith(f"{tree}: 0 faults, 1 note\n")


def test_names_of_any_bytes_can_be_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tree = images.tree(tmp_path / "data")
    (tree / "train" / "cat" / os.fsdecode(b"\xff\n.jpg")).write_bytes(b"")
    assert doctor(tree) == 1
    out = capsys.readouterr().out
    assert r"\udcff\n.jpg is an empty file" in out
    assert len(out.splitlines()) == 2


def test_smaller_images_of_a_pack_are_what_their_members_names_say(tmp_path: Path):
    """Also of a pack of that pack; the files that they were are PNGs."""
    big = images.saved(images.picture(0, (60, 40)), "PNG")
    tree = images.tree(tmp_path / "data", make=lambda number: big + bytes(number))
    for path in tree.rglob("*.JPEG"):
        path.rename(path.with_suffix(".png"))
    for source, out in ((tree, tmp_path / "pack"), (tmp_path / "pack", tmp_path / "again")):
        pack(open_sides(source, sizes=True), out, resize=20)
        assert not [fault for fault in examine(out) if "by its content" in fault.problem]

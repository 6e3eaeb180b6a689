"""The whole list of what can be wrong with files: one message each, no traceback, and nothing is written anywhere."""

import hashlib
import os
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
import torch

from onehour.data.doctor import examine
from onehour.data.images import image_folder, open_sides
from onehour.data.index import INDEX, write_index
from onehour.data.loader import Feed
from onehour.data.pack import pack
from onehour.rules.shuffle import SampleStream

CPU = torch.device("cpu")
FILE = "train/cat/0001.JPEG"


def read_all(path: Path) -> None:
    """What a run reads, in a loader process."""
    train, validation = image_folder(path)
    stream = SampleStream(samples=len(train), minibatch=8, seed=0)
    with closing(Feed(train, seed=0, loaders=1, device=CPU, stream=stream)) as feed:
        for _ in feed.passes([range(1)], start=0, stop=-(-len(train) // 8)):
            pass
    with closing(Feed(validation, seed=0, loaders=1, device=CPU)) as feed:
        for _ in feed.chunks(range(1)):
            pass


def everything(root: Path) -> dict[str, str]:
    """Every path below a folder and what is there."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        for path in root.rglob("*")
    }


def relinked(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


IMAGES: dict[str, tuple[Callable[[Path, ModuleType], object], str | None]] = {
    "truncated": (lambda p, i: p.write_bytes(p.read_bytes()[:-200]), "cannot be decoded: "),
    "empty": (lambda p, i: p.write_bytes(b""), "is an empty file"),
    "not an image": (lambda p, i: p.write_bytes(b"<html>404"), "is not a readable image"),
    "a bomb": (lambda p, i: p.write_bytes(i.bomb()), "has 13300×13300 pixels, more than the cap of 64,000,000"),
    "a larger bomb": (lambda p, i: p.write_bytes(i.bomb(65_000, 65_000)), "cannot be decoded: Image size"),
    "1×1": (lambda p, i: p.write_bytes(i.saved(i.picture(1, (1, 1)), "PNG")), None),
    "1×10,000": (lambda p, i: p.write_bytes(i.saved(i.picture(1, (1, 10_000)), "JPEG")), None),
    "10,000×1": (lambda p, i: p.write_bytes(i.saved(i.picture(1, (10_000, 1)), "JPEG")), None),
    "wrong extension": (lambda p, i: p.write_bytes(i.saved(i.picture(1), "WEBP")), None),
    "a program in PostScript": (
        lambda p, i: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\nquit"),
        "is not a readable image",
    ),
    "a link in a circle": (lambda p, i: relinked(p, p.name), "is a link that cannot be followed (Too many levels"),
    "a link to nothing": (lambda p, i: relinked(p, "gone.jpg"), "is a link that cannot be followed (No such file"),
    "a pipe": (lambda p, i: [p.unlink(), os.mkfifo(p)], "is not a regular file"),
    "a folder": (lambda p, i: [p.unlink(), p.mkdir()], "is a folder, where images are expected"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_bad_image_is_one_message_and_an_odd_one_is_read(images: ModuleType, tmp_path: Path, kind: str):
    tree = images.tree(tmp_path / "data", train=3, val=1)
    happens, said = IMAGES[kind]
    happens(tree / FILE, images)
    before = everything(tmp_path)
    if said is None:
        read_all(tree)
    else:
        with pytest.raises(ValueError, match="cat/0001") as raised:
            read_all(tree)
        assert str(raised.value).startswith(f"{tree / FILE} {said}")
        assert "; " in str(raised.value)
        assert str(raised.value).isprintable()
        assert [fault.path for fault in examine(tree) if not fault.note] == [str(tree / FILE)]
    assert everything(tmp_path) == before


def refuse(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Permission denied, for a user who may read everything too."""
    real = os.open

    def refusing(name: str, *rest: int) -> int:
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", name)
        return real(name, *rest)

    monkeypatch.setattr(os, "open", refusing)


def test_a_file_that_may_not_be_read_is_one_message(
    images: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = images.tree(tmp_path / "data", train=3, val=1)
    refuse(monkeypatch, tree / FILE)
    with pytest.raises(ValueError, match=r"cat/0001\.JPEG cannot be read: Permission denied; restore or remove it$"):
        read_all(tree)


def test_a_shard_that_may_not_be_read_is_one_message(
    images: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pack(open_sides(images.tree(tmp_path / "data", train=3, val=1), sizes=True), tmp_path / "out")
    refuse(monkeypatch, tmp_path / "out" / "train-00000.tar")
    with pytest.raises(ValueError, match=r"train-00000\.tar cannot be read: Permission denied; restore the shard"):
        read_all(tmp_path / "out")


@pytest.mark.parametrize("when", ["before the start", "after the start"])
def test_a_file_that_vanished_since_the_index_is_one_message(images: ModuleType, tmp_path: Path, when: str):
    tree = images.tree(tmp_path / "data", train=3, val=1)
    write_index(tree)
    if when == "before the start":
        (tree / FILE).unlink()
        with pytest.raises(ValueError, match=r"out of date: .*cat/0001\.JPEG is in the index, and gone; restore it"):
            read_all(tree)
    else:
        train, _ = image_folder(tree)
        (tree / FILE).unlink()
        with pytest.raises(ValueError, match=r"cat/0001\.JPEG cannot be read: No such file or directory; restore or"):
            train.keyed(1, 0)


def test_another_data_sets_index_is_one_message(images: ModuleType, tmp_path: Path):
    tree, other = images.tree(tmp_path / "data", train=3, val=1), images.tree(tmp_path / "other", train=5, val=1)
    write_index(other)
    (other / INDEX).rename(tree / INDEX)
    with pytest.raises(ValueError, match=rf"{INDEX} is out of date: .* is in the index, and gone; .* more changes$"):
        read_all(tree)


def test_a_hostile_tar_in_the_place_of_a_shard_writes_nothing(images: ModuleType, tmp_path: Path):
    """What tests/data/test_shards.py plants one by one, all in one archive."""
    pack(open_sides(images.tree(tmp_path / "data", train=3, val=1), sizes=True), tmp_path / "out")
    shard = tmp_path / "out" / "train-00000.tar"
    size = shard.stat().st_size
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, kind in (("../escaped", tarfile.REGTYPE), (f"{tmp_path}/absolute", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name.lstrip("/") if kind == tarfile.REGTYPE else name[1:])
            member.type, member.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            archive.addfile(member)
    shard.write_bytes(shard.read_bytes()[:size].ljust(size, b"\0"))
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=r"train-00000\.tar begins with '\.\./escaped', by the pack's index with"):
        read_all(tmp_path / "out")
    assert len(examine(tmp_path / "out")) == 1
    assert everything(tmp_path) == before


def test_files_that_decode_without_an_error_to_wrong_pixels_are_all_found_with_digests(
    images: ModuleType, tmp_path: Path
):
    tree = images.tree(tmp_path / "data", train=30, val=1)
    write_index(tree, digests=True)
    files = sorted((tree / "train").glob("*/*"))
    for number, path in enumerate(files):
        path.write_bytes(images.flipped(path.read_bytes(), 0.65 + 0.3 * number / len(files)))
    faults = examine(tree)
    assert [fault.path for fault in faults] == [str(path) for path in files]
    (tree / INDEX).unlink()
    assert sum(not fault.note for fault in examine(tree)) < len(files) / 4

"""The whole list of what can be wrong with files: one message each, no traceback, and nothing is written anywhere."""

import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import images
import pytest
import torch

from onehour.data.doctor import examine
from onehour.data.images import image_folder
from onehour.data.index import INDEX, write_index
from onehour.data.loader import Feed
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


IMAGES: dict[str, tuple[Callable[[Path], object], str | None]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-200]), "cannot be decoded: "),
    "empty": (lambda p: p.write_bytes(b""), "is an empty file"),
    "not an image": (lambda p: p.write_bytes(b"<html>404"), "is not a readable image"),
    "a bomb": (lambda p: p.write_bytes(images.bomb()), "has 13300×13300 pixels, more than the cap of 64,000,000"),
    "a larger bomb": (lambda p: p.write_bytes(images.bomb(65_000, 65_000)), "cannot be decoded: Image size"),
    "1×1": (lambda p: p.write_bytes(images.saved(images.picture(1, (1, 1)), "PNG")), None),
    "1×10,000": (lambda p: p.write_bytes(images.saved(images.picture(1, (1, 10_000)), "JPEG")), None),
    "10,000×1": (lambda p: p.write_bytes(images.saved(images.picture(1, (10_000, 1)), "JPEG")), None),
    "wrong extension": (lambda p: p.write_bytes(images.saved(images.picture(1), "WEBP")), None),
    "a program in PostScript": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\nquit"), "is not a readable image"),
    "a link in a circle": (lambda p: relinked(p, p.name), "is a link that cannot be followed (Too many levels"),
    "a link to nothing": (lambda p: relinked(p, "gone.jpg"), "is a link that cannot be followed (No such file"),
    "a pipe": (lambda p: [p.unlink(), os.mkfifo(p)], "is not a regular file"),
    "a folder": (lambda p: [p.unlink(), p.mkdir()], "is a folder, where images are expected"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_bad_image_is_one_message_and_an_odd_one_is_read(tmp_path: Path, kind: str):
    tree = images.tree(tmp_path / "data", train=3, val=1)
    happens, said = IMAGES[kind]
    happens(tree / FILE)
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


def test_files_that_decode_without_an_error_to_wrong_pixels_are_all_found_with_digests(tmp_path: Path):
    tree = images.tree(tmp_path / "data", train=30, val=1)
    write_index(tree, digests=True)
    files = sorted((tree / "train").glob("*/*"))
    for number, path in enumerate(files):
        path.write_bytes(images.flipped(path.read_bytes(), 0.65 + 0.3 * number / len(files)))
    faults = examine(tree)
    assert [fault.path for fault in faults] == [str(path) for path in files]
    (tree / INDEX).unlink()
    assert sum(not fault.note for fault in examine(tree)) < len(files) / 4

"""Whatever happened to a pack is one message before a wrong image is trained on, and nothing is ever extracted."""

import io
import os
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import images
import numpy as np
import pytest

from onehour.data.dataset import FaultError
from onehour.data.doctor import examine
from onehour.data.images import image_folder, open_sides
from onehour.data.index import INDEX, open_arrays, write_arrays
from onehour.data.pack import pack


@pytest.fixture
def out(tmp_path: Path) -> Path:
    tree = images.tree(tmp_path / "data")
    pack(open_sides(tree, sizes=True), tmp_path / "out", shard_bytes=6000)
    return tmp_path / "out"


def swap(out: Path) -> None:
    a, b, c = out / "train-00000.tar", out / "train-00001.tar", out / "c"
    a.rename(c)
    b.rename(a)
    c.rename(b)


def another_tar(out: Path, member: tarfile.TarInfo) -> None:
    """A shard of the same size that begins with another member."""
    size = (out / "train-00001.tar").stat().st_size
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(bytes(member.size)))
    (out / "train-00001.tar").write_bytes(buffer.getvalue()[:size].ljust(size, b"\0"))


def named(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    member.size = 700 if kind == tarfile.REGTYPE else 0
    return member


def cut(out: Path) -> None:
    with (out / "train-00001.tar").open("rb+") as file:
        file.truncate(3000)


BREAK: dict[str, tuple[Callable[[Path], object], str]] = {
    "a cut shard": (cut, r"train-00001\.tar has 3,000 bytes, [\d,]+ by the pack's index"),
    "an empty shard": (lambda out: (out / "train-00001.tar").write_bytes(b""), r"train-00001\.tar has 0 bytes"),
    "a shard gone": (lambda out: (out / "train-00001.tar").unlink(), r"train-00001\.tar cannot be read: No such file"),
    "a circle of links": (
        lambda out: [(out / "train-00001.tar").unlink(), (out / "train-00001.tar").symlink_to("train-00001.tar")],
        r"train-00001\.tar cannot be read: Too many levels of symbolic links",
    ),
    "a folder in its place": (
        lambda out: [(out / "train-00001.tar").unlink(), (out / "train-00001.tar").mkdir()],
        r"train-00001\.tar (cannot be read: Is a directory|has [\d,]+ bytes)",
    ),
    "two shards swapped": (swap, r"train-00000\.tar (begins with '\d{8}\.jpeg'|has [\d,]+ bytes)"),
    "a name with ../": (lambda out: another_tar(out, named("../../escaped.jpg")), "begins with '../../escaped.jpg'"),
    "an absolute name": (lambda out: another_tar(out, named("/tmp/escaped.jpg")), "begins with '/tmp/escaped.jpg'"),
    "a link": (lambda out: another_tar(out, named("escaped", tarfile.SYMTYPE, "/etc/passwd")), "begins with 'escaped'"),
    "no tar": (lambda out: another_tar(out, named("x")) or _zeros(out / "train-00001.tar"), "begins with nothing"),
}


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("kind", BREAK)
def test_a_broken_shard_is_one_message_at_the_start(out: Path, kind: str):
    before = set(out.parent.rglob("*"))
    damage, message = BREAK[kind]
    damage(out)
    for refuse in (lambda: image_folder(out), lambda: image_folder(out / INDEX)):
        with pytest.raises(ValueError, match=message) as raised:
            refuse()
        assert "\n" not in str(raised.value)
        assert "; restore the shard and the index that belong together, or pack the data again" in str(raised.value)
    faults = [fault for fault in examine(out) if not fault.note]
    assert len(faults) == (2 if kind == "two shards swapped" else 1)
    assert re.search(message, str(faults[0]))
    assert set(out.parent.rglob("*")) <= before | {out / "train-00001.tar"}
    assert not Path("/tmp/escaped.jpg").exists()


def rewrite(out: Path, arrays: dict[str, Callable[[np.ndarray], np.ndarray]], about: dict[str, object]) -> None:
    """An index with other content, and a digest that fits it."""
    old, words = open_arrays(out / INDEX)
    changed = {name: arrays[name](array.copy()) if name in arrays else array.copy() for name, array in old.items()}
    write_arrays(out / INDEX, changed, {**words, **about})


WRONG_INDEX: dict[str, tuple[dict[str, Callable[[np.ndarray], np.ndarray]], dict[str, object]]] = {
    "a shard elsewhere": ({}, {"shards": {"train": [["../../etc/passwd", 0, 5]], "val": []}}),
    "an absolute shard": ({}, {"shards": {"train": [["/etc/passwd.tar", 0, 5]], "val": []}}),
    "no shards": ({}, {"shards": {"train": [], "val": []}}),
    "shards of another form": ({}, {"shards": {"train": ["x"], "val": [5]}}),
    "shards of other types": ({}, {"shards": {"train": [["a.tar", "b", None]], "val": [["a.tar", "b", None]]}}),
    "offsets beyond the end": ({"train.offsets": lambda a: a + 10**9}, {}),
    "offsets below zero": ({"train.offsets": lambda a: -a}, {}),
    "too few offsets": ({"train.offsets": lambda a: a[:3]}, {}),
    "sizes beyond the end": ({"train.sizes": lambda a: a + 10**9}, {}),
    "labels of no class": ({"train.labels": lambda a: a + 5}, {}),
}


@pytest.mark.parametrize("kind", WRONG_INDEX)
def test_an_index_that_no_packing_would_write_is_refused(out: Path, kind: str):
    rewrite(out, *WRONG_INDEX[kind])
    said = rf"^{re.escape(str(out / INDEX))} (is|has|names) .*; (make it|pack the data) again"
    with pytest.raises(ValueError, match=said):
        image_folder(out)
    assert len(examine(out)) == 1


def test_an_index_without_offsets_or_checks_is_refused(out: Path):
    old, words = open_arrays(out / INDEX)
    for name in ("train.offsets", "val.checks"):
        write_arrays(out / INDEX, {key: array.copy() for key, array in old.items() if key != name}, words)
        with pytest.raises(ValueError, match="has offsets or shards that no pack would have; pack the data again"):
            image_folder(out)


def test_another_packs_index_is_refused(out: Path, tmp_path: Path):
    tree = images.tree(tmp_path / "other", train=9)
    pack(open_sides(tree, sizes=True), tmp_path / "second", shard_bytes=6000)
    shutil.copy(tmp_path / "second" / INDEX, out / INDEX)
    said = r"train-0000\d\.tar (has [\d,]+ bytes, [\d,]+ by|cannot be read).*that belong together"
    with pytest.raises(ValueError, match=said):
        image_folder(out)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(at)
        file.write(data)


def test_a_wrong_byte_is_noticed_when_it_is_read(out: Path):
    train, _ = image_folder(out)
    offset = int(train.source.offsets[2])  # type: ignore[attr-defined]
    overwrite(out / "train-00000.tar", offset + 200, b"\x99")
    said = r"train-00000\.tar: cat/0002\.JPEG has other bytes than .*: its CRC-32 differs"
    with pytest.raises(FaultError, match=said):
        image_folder(out)[0].keyed(2, 0)
    assert [fault.path for fault in examine(out)] == [f"{out}/train-00000.tar: cat/0002.JPEG"]


@pytest.mark.parametrize(
    ("member", "said"),
    [
        (named("../../escaped.jpg"), "is a member called '../../escaped.jpg' in its shard"),
        (named("/tmp/escaped.jpg"), "is a member called '/tmp/escaped.jpg' in its shard"),
        (named("00000002.jpg", tarfile.SYMTYPE, "/etc/passwd"), "is a link called '00000002.jpg' in its shard"),
        (named("00000002.jpg", tarfile.LNKTYPE, "../x"), "is a link called '00000002.jpg' in its shard"),
        (named("00000002.jpg", tarfile.FIFOTYPE), "is a member called '00000002.jpg' in its shard"),
    ],
)
def test_a_hostile_member_inside_is_found_and_never_extracted(out: Path, member: tarfile.TarInfo, said: str):
    train, _ = image_folder(out)
    offset = int(train.source.offsets[2])  # type: ignore[attr-defined]
    overwrite(out / "train-00000.tar", offset - 512, member.tobuf(tarfile.USTAR_FORMAT))
    (fault,) = examine(out)
    assert fault.path == f"{out}/train-00000.tar: cat/0002.JPEG"
    assert fault.problem == said
    assert "never extract it" in fault.remedy
    if member.name.startswith("00000002"):
        train.keyed(2, 0)  # its bytes are the image's, whatever the header says of them
    else:
        with pytest.raises(FaultError, match="is not where the index says: there is"):
            train.keyed(2, 0)


def test_a_damaged_header_and_a_wrong_label_are_found(out: Path):
    train, _ = image_folder(out)
    offsets, sizes = train.source.offsets, train.source.table.sizes  # type: ignore[attr-defined]
    assert sizes is not None
    overwrite(out / "train-00000.tar", int(offsets[1]) - 512 + 130, b"7")
    behind = int(offsets[2] + sizes[2] + -sizes[2] % 512)
    overwrite(out / "train-00000.tar", behind + 512, b"2")
    assert [fault.problem for fault in examine(out)] == [
        "has a damaged header in its shard (bad checksum)",
        "is not followed by its label 0 in the shard",
    ]


def test_a_shard_that_vanishes_or_shrinks_while_training_is_one_message(out: Path):
    train, _ = image_folder(out)
    last = len(train) - 1
    os.truncate(out / train.source.shards[-1].name, 100)  # type: ignore[attr-defined]
    said = r"train-\d{5}\.tar: é x/0007\.JPEG is not where the index says: there is nothing"
    with pytest.raises(FaultError, match=said):
        train.keyed(last, 0)


def test_a_stray_tar_is_a_note_and_a_damaged_index_or_none_a_fault(out: Path):
    shutil.copy(out / "train-00000.tar", out / "old.tar")
    (fault,) = examine(out)
    assert (fault.path, fault.note) == (str(out / "old.tar"), True)
    (out / INDEX).write_bytes((out / INDEX).read_bytes()[:-5])
    (fault,) = examine(out)
    assert "is not an index of onehour, or is damaged; make it again" in str(fault)
    (out / INDEX).unlink()
    (fault,) = examine(out)
    assert str(fault) == f"{out} holds shards and no index: it was never finished; pack the data again"
    with pytest.raises(ValueError, match="is not a folder; expected"):
        image_folder(out)

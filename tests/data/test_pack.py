"""A pack holds a folder's files byte for byte, in shards that tar reads; it is whole or it is not there."""

import hashlib
import io
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import images
import numpy as np
import pytest
from PIL import Image

from onehour.data.decode import decode, orientation_of, shrunk
from onehour.data.images import image_folder, open_sides
from onehour.data.index import INDEX, write_index
from onehour.data.pack import PARTS, Shards, pack, split
from onehour.data.sources import load_data

SMALL = 6000
"""Bytes of a shard, so that there are several."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return images.tree(tmp_path / "data")


def packed(tree: Path, **options: object) -> Path:
    out = tree.parent / "out"
    pack(open_sides(tree, sizes=True), out, **({"shard_bytes": SMALL} | options))  # type: ignore[arg-type]
    return out


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_pack_gives_what_the_folder_gives(tree: Path, jobs: int):
    counted: list[int] = []
    out = packed(tree, jobs=jobs, done=counted.append)
    assert sum(counted) == 30
    assert len(list(out.glob("train-*.tar"))) > 2
    assert not (out / PARTS).exists()
    assert image_folder(out)[0].source.name(0) == f"{out}/train-00000.tar: cat/0000.JPEG"
    for folder, shards in zip(image_folder(tree), image_folder(out), strict=True):
        assert folder.classes == shards.classes
        np.testing.assert_array_equal(folder.source.labels, shards.source.labels)
        for index in range(len(folder)):
            assert folder.source.read(index) == shards.source.read(index)
    assert load_data(str(out / INDEX)).classes == load_data(str(out)).classes == 3


def test_tar_reads_the_shards_and_their_names_pair_as_webdatasets(tree: Path):
    out = packed(tree)
    train, validation = image_folder(tree)
    for side, dataset in (("train", train), ("val", validation)):
        samples: dict[str, dict[str, bytes]] = {}
        for shard in sorted(out.glob(f"{side}-*.tar")):
            names = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True).stdout.split()
            with tarfile.open(shard) as archive:
                assert [member.name for member in archive] == names
                for member in archive:
                    assert member.isreg()
                    assert (member.uid, member.mtime, member.mode) == (0, 0, 0o644)
                    key, _, suffix = member.name.partition(".")  # a sample's key ends at its first dot
                    file = archive.extractfile(member)
                    assert file is not None
                    samples.setdefault(key, {})[suffix] = file.read()
        assert len(samples) == len(dataset)
        for index, key in enumerate(sorted(samples)):
            assert samples[key] == {"jpeg": dataset.source.read(index), "cls": b"%d" % dataset.source.labels[index]}
    assert (out / "classes.txt").read_text("utf-8").splitlines() == ["cat", "dog", "é x"]


def test_the_same_data_is_the_same_pack(tree: Path, tmp_path: Path):
    out = packed(tree)
    again = tmp_path / "again"
    write_index(tree, digests=True)
    pack(open_sides(tree), again, shard_bytes=SMALL, jobs=2)
    assert digests(out) == digests(again)


def test_packing_again_changes_nothing_but_packs_a_lost_shard_again(tree: Path):
    out = packed(tree)
    before, times = digests(out), {path.name: path.stat().st_mtime_ns for path in out.glob("[!.]*")}
    packed(tree)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("[!.]*")} == times
    (out / "train-00001.tar").unlink()
    packed(tree)
    assert digests(out) == before


def test_an_interrupted_pack_goes_on_and_ends_the_same(tree: Path, tmp_path: Path):
    whole = digests(packed(tree))
    (tmp_path / "out").rename(tmp_path / "whole")

    told: list[int] = []

    def stop(items: int) -> None:
        told.append(items)
        if sum(told) > 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(tree, done=stop)
    out = tmp_path / "out"
    assert not (out / INDEX).exists()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(done) < len(list((tmp_path / "whole").glob("*.tar")))
    packed(tree)
    assert digests(out) == whole
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1])
def test_a_killed_pack_goes_on_and_ends_the_same(tree: Path, tmp_path: Path, after: float):
    """Its process alone is killed: those that it started must end with it, and not write on."""
    out, (here, there) = tmp_path / "killed", os.pipe()
    if (packing := os.fork()) == 0:
        try:
            os.close(here)
            pack(open_sides(tree, sizes=True), out, shard_bytes=SMALL, resize=10, jobs=2)
        finally:
            os._exit(0)
    os.close(there)
    time.sleep(after)
    os.kill(packing, signal.SIGKILL)
    os.waitpid(packing, 0)
    assert os.read(here, 1) == b""  # when the last process that has the other end has ended
    os.close(here)
    pack(open_sides(tree, sizes=True), out, shard_bytes=SMALL, resize=10)
    assert digests(out) == digests(packed(tree, resize=10))


def test_another_size_of_shards_replaces_what_was_interrupted(tree: Path, tmp_path: Path):
    def stop(items: int) -> None:
        if len(list((tmp_path / "out").glob("train-*.tar"))) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packed(tree, done=stop)
    out = packed(tree, shard_bytes=10**9)
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-00000.tar", "val-00000.tar"]
    assert image_folder(out)[0].source.read(3) == image_folder(tree)[0].source.read(3)


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1], [9, 1, 9, 1], [0, 0, 0], list(range(50))])
def test_every_sample_is_in_one_shard(sizes: list[int]):
    for limit in (1, 5, 1000):
        spans = split(np.array(sizes), limit)
        assert [index for span in spans for index in span] == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in span[:-1]) < limit for span in spans)


def test_larger_images_are_resized_and_others_kept(tmp_path: Path):
    sizes = [(90, 60), (60, 90), (40, 30), (400, 20)]
    tree = images.tree(
        tmp_path / "data", make=lambda i: images.saved(images.picture(i, sizes[i % 4]), "PNG"), train=4, val=4
    )
    out = packed(tree, resize=45, shard_bytes=10**6)
    before, after = image_folder(tree)[0], image_folder(out)[0]
    assert (before.facts["resized"], after.facts["resized"]) == (None, 45)
    for index in range(len(before)):
        old, new = before.source.read(index), after.source.read(index)
        if index % 4 < 2:
            assert sorted(decode(new, "x").shape[:2]) == [45, 68]
            assert new.startswith(b"\xff\xd8")
            smaller = Image.fromarray(decode(new, "x"))
            reference = Image.open(io.BytesIO(old)).resize(smaller.size, Image.Resampling.BILINEAR)
            grey, expected = (np.asarray(image.convert("L")).astype(int) for image in (smaller, reference))
            assert np.abs(grey - expected).mean() < 2  # quality 95; colours have half the resolution
        else:
            assert new == old
    with tarfile.open(out / "train-00000.tar") as archive:
        assert [name for name in archive.getnames() if not name.endswith("cls")][:4] == [
            *("00000000.jpg", "00000001.jpg", "00000002.jpeg", "00000003.jpeg")
        ]


def test_a_resized_image_keeps_its_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = images.saved(images.picture(1, (90, 60)), "JPEG", exif=exif)
    smaller = shrunk(data, "x", 30)
    assert smaller is not None
    assert orientation_of(smaller) == 6
    assert decode(smaller, "x").shape == (30, 45, 3)
    assert decode(smaller, "x", exif=True).shape == (45, 30, 3)


def test_a_pack_of_a_pack_remembers_the_smaller_size(tree: Path, tmp_path: Path):
    first = packed(tree, resize=15)
    pack(open_sides(first), tmp_path / "second", resize=100)
    pack(open_sides(first), tmp_path / "third", resize=10)
    assert image_folder(tmp_path / "second")[0].facts["resized"] == 15
    assert image_folder(tmp_path / "third")[0].facts["resized"] == 10


def test_a_pack_can_be_sent_and_forked(tree: Path):
    train, _ = image_folder(packed(tree))
    expected = train.source.read(5)
    assert pickle.loads(pickle.dumps(train)).source.read(5) == expected
    if (child := os.fork()) == 0:
        os._exit(0 if train.source.read(5) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_few_shards_are_open_at_once(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onehour.data.pack.OPEN", 2)
    train, _ = image_folder(packed(tree, shard_bytes=1))
    assert isinstance(train.source, Shards)
    before = len(os.listdir("/proc/self/fd"))
    for index in (*range(24), 3, 20, 3):
        train.source.read(index)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_other_files_and_other_packs_are_left_alone(tree: Path, tmp_path: Path):
    for inside in ("train", "train/cat", "val/x"):
        with pytest.raises(ValueError, match="lies inside the data to pack; choose a folder outside of"):
            pack(open_sides(tree, sizes=True), tree / inside)
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match=r"out cannot be written: File exists; finished shards are kept"):
        packed(tree)
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"out holds other files \(thesis\.tex …\); choose a new folder"):
        packed(tree)
    (tmp_path / "out" / "thesis.tex").unlink()
    before = digests(packed(tree))
    with pytest.raises(ValueError, match="holds a pack of other data or another --resize; choose another folder"):
        packed(tree, resize=5)
    (tree / "train" / "cat" / "0000.JPEG").unlink()
    with pytest.raises(ValueError, match="holds a pack of other data"):
        packed(tree)
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_image_that_cannot_be_read_is_one_message(tree: Path, jobs: int):
    sides = open_sides(tree, sizes=True)
    (tree / "train" / "dog" / "0001.JPEG").unlink()
    said = r"dog/0001\.JPEG cannot be read: No such file or directory; restore or remove"
    with pytest.raises(ValueError, match=said):
        pack(sides, tree.parent / "out", jobs=jobs)
    (tree / "train" / "dog" / "0001.JPEG").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"dog/0001\.JPEG is not a readable image"):
        pack(open_sides(tree, sizes=True), tree.parent / "out", resize=10, jobs=jobs)


def test_a_full_disk_is_said_before_anything_is_written_or_when_it_fills(tree: Path, monkeypatch: pytest.MonkeyPatch):
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        with pytest.raises(ValueError, match=r"out needs [\d,]+ bytes more, its disk has 1,000; make room, or pack"):
            packed(tree)
    assert not list((tree.parent / "out").glob("*.tar"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match=r"cannot be written: No space left on device; finished shards are kept, and"):
        packed(tree)
    monkeypatch.undo()
    assert image_folder(packed(tree))[0].source.read(0)


def test_two_at_once_are_refused(tree: Path):
    code = (
        "import sys, fcntl, os; file = open(sys.argv[1] + '/.lock', 'w'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    out = tree.parent / "out"
    out.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(
            ValueError, match=rf"{re.escape(str(out))} is being written by another process; wait for it"
        ):
            packed(tree)
        other.communicate(b"")


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_pack_that_is_moved_is_written_no_further_and_goes_on_where_it_is(tree: Path, jobs: int):
    out, moved = tree.parent / "out", tree.parent / "moved"

    def move(items: int) -> None:
        if out.exists():
            out.rename(moved)

    with pytest.raises(ValueError, match=r"out was moved to .*moved while .*; the same command with OUT .*moved"):
        packed(tree, jobs=jobs, done=move)
    assert not out.exists()
    pack(open_sides(tree, sizes=True), moved, shard_bytes=SMALL)
    assert digests(moved) == digests(packed(tree))


def test_images_above_the_cap_are_made_smaller_once_it_is_raised(tmp_path: Path):
    tree = images.tree(tmp_path / "data", train=1, val=1)
    with pytest.raises(
        ValueError, match=r"more than the cap of 400; remove it, make it smaller, or raise the pixel cap"
    ):
        packed(tree, resize=10, pixels=400)
    assert image_folder(packed(tree, resize=10, pixels=1000))[0].facts["resized"] == 10

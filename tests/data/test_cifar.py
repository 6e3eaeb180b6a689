"""CIFAR-10's archive, taken apart without unpickling; its augmentation, keyed."""

import gzip
import io
import os
import pickle
import random
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from onehour.data.cifar import CLASSES, MEAN, STD, TEST, TRAIN, Cifar, cifar10
from onehour.data.sources import load_data


def sample(number: int, count: int = 12) -> tuple[np.ndarray, list[int]]:
    draw = np.random.default_rng(number)
    return draw.integers(0, 256, (count, 3072), dtype=np.uint8), draw.integers(0, 10, count).tolist()


def python2(data: np.ndarray, labels: list[int]) -> bytes:
    """The opcodes of the original: Python 2's cPickle, protocol 2, numpy's _reconstruct with the pixels as one str."""

    def text(value: bytes) -> bytes:
        short = len(value) < 256
        return (b"U" + bytes([len(value)]) if short else b"T" + struct.pack("<i", len(value))) + value

    rows = b"K" + bytes([len(labels)])
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t(K\x01" + rows
    array += (
        b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    )
    array += b"K\x00tb\x89" + text(data.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"](" + b"".join(text(b"cat_s_%06d.png" % i) for i in range(len(labels))) + b"e"
    parts = [b"batch_label", text(b"training batch 1 of 5"), b"labels", numbers, b"data", array, b"filenames", names]
    items = [text(part) if i % 2 == 0 else part for i, part in enumerate(parts)]
    return b"\x80\x02}q\x01(" + b"".join(items) + b"u."


def python3(protocol: int, keys: type = bytes):
    def pickled(data: np.ndarray, labels: list[int]) -> bytes:
        key = (lambda name: name.encode()) if keys is bytes else str
        batch = {
            key("batch_label"): b"x",
            key("labels"): labels,
            key("data"): data,
            key("filenames"): [b"a.png"] * len(labels),
        }
        return pickle.dumps(batch, protocol=protocol)

    return pickled


def archive(path: Path, members: dict[str, bytes], folder: str = "cifar-10-batches-py/") -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, body in members.items():
            info = tarfile.TarInfo(folder + name)
            info.size = len(body)
            file.addfile(info, io.BytesIO(body))
    return path


def whole(make) -> dict[str, bytes]:
    """The members of an archive of six batches, and one that is none."""
    members = {name: make(*sample(number)) for number, name in enumerate((*TRAIN, *TEST))}
    return {"batches.meta": pickle.dumps({"label_names": CLASSES}), **members}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return archive(tmp_path_factory.mktemp("cifar") / "cifar-10-python.tar.gz", whole(python2))


def test_python2s_form_is_what_pickle_reads():
    data, labels = sample(0)
    batch = pickle.loads(python2(data, labels), encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], data)
    assert batch[b"labels"] == labels


@pytest.mark.parametrize(
    "make", [python2, *(python3(protocol) for protocol in (2, 3, 4, 5)), python3(2, keys=str), python3(4, keys=str)]
)
def test_images_and_labels_are_those_of_every_protocol(make, tmp_path):
    train, validation = cifar10(archive(tmp_path / "c.tar.gz", whole(make)))
    data, labels = zip(*(sample(number) for number in range(6)), strict=True)
    images = np.concatenate(data[:5]).reshape(-1, 3, 32, 32)
    np.testing.assert_array_equal(train.images.numpy(), images)
    assert train.labels.tolist() == [label for part in labels[:5] for label in part]
    np.testing.assert_array_equal(validation.images.numpy(), data[5].reshape(-1, 3, 32, 32))
    assert validation.labels.tolist() == labels[5]
    assert train.classes == CLASSES


def test_many_labels_are_all_taken(tmp_path):
    # Picklers write lists in parts of a thousand.
    labels = [i * i % 10 for i in range(2500)]
    body = python3(2)(np.zeros((2500, 3072), np.uint8), labels)
    _, validation = cifar10(archive(tmp_path / "c.tgz", dict.fromkeys((*TRAIN, *TEST), body)))
    assert validation.labels.tolist() == labels


def test_nothing_in_an_archive_is_executed(tmp_path):
    class Planted:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "planted"),)

    members = whole(python2)
    members["data_batch_1"] = pickle.dumps({"data": Planted(), "labels": [1]})
    with pytest.raises(ValueError, match="data_batch_1 has 0 blocks of"):
        cifar10(archive(tmp_path / "c.tar.gz", members))
    pickle.loads(members["data_batch_1"])
    assert (tmp_path / "planted").exists()  # so it would have been


def test_only_names_matter_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = archive(tmp_path / "c.tar.gz", whole(python2), folder="../../elsewhere/")
    cifar10(path)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_batch": None}, "it has no test_batch"),
        ({"data_batch_2": None, "data_batch_4": None}, "it has no data_batch_2, data_batch_4"),
        ({"test_batch": b"hello"}, "test_batch is not a pickled batch"),
        ({"test_batch": b""}, "test_batch is not a pickled batch"),
        ({"test_batch": python2(*sample(5))[:-9000]}, "test_batch is not a pickled batch"),
        ({"test_batch": python2(sample(5)[0], sample(5)[1][:-1])}, "1 blocks of .36864. bytes and 11 labels"),
        ({"test_batch": python2(sample(5)[0], [10] * 12)}, "labels from 10 to 10, not 0 to 9"),
        ({"test_batch": pickle.dumps({"labels": [1, 2]})}, "0 blocks"),
        ({"test_batch": pickle.dumps({"fine_labels": [1], "data": bytes(3072)})}, "and 0 labels"),
    ],
)
def test_an_archive_that_is_not_cifars_is_one_message(tmp_path, change, message):
    members = {name: body for name, body in {**whole(python2), **change}.items() if body is not None}
    with pytest.raises(ValueError, match=message) as raised:
        cifar10(archive(tmp_path / "c.tar.gz", members))
    assert str(tmp_path / "c.tar.gz") in str(raised.value)
    assert "expected cifar-10-python.tar.gz" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"hello",
        lambda body: b"",
        lambda body: body[: len(body) // 2],
        lambda body: body[:-4],
        lambda body: body[:-8] + bytes([body[-8] ^ 1]) + body[-7:],
        lambda body: gzip.compress(b"hello"),
    ],
)
def test_a_damaged_file_is_one_message(tiny, tmp_path, damage):
    path = tmp_path / "c.tar.gz"
    path.write_bytes(damage(tiny.read_bytes()))
    said = r"cannot be read as an archive: .*; expected cifar-10-python\.tar\.gz"
    with pytest.raises(ValueError, match=said) as raised:
        cifar10(path)
    assert "\n" not in str(raised.value)


def test_mutants_give_batches_or_a_value_error(tmp_path):
    draw, members = random.Random(0), whole(python2)
    for _ in range(60):
        body = bytearray(members["test_batch"])
        for _ in range(3):
            body[draw.choice((draw.randrange(400), draw.randrange(len(body))))] = draw.randrange(256)
        try:
            cifar10(archive(tmp_path / "c.tar.gz", {**members, "test_batch": bytes(body)}))
        except ValueError as error:
            assert "c.tar.gz" in str(error)  # noqa: PT017


def test_a_missing_file_is_one_message(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*c\.tgz; expected cifar-10-python\.tar\.gz as https://"):
        load_data(str(tmp_path / "c.tgz"))


def test_an_archive_is_data_that_a_recipe_can_name(tiny):
    data = load_data(str(tiny))
    assert (len(data.train), len(data.validation), data.classes, data.channels) == (60, 12, 10, 3)


def test_training_images_are_padded_cropped_and_flipped_by_their_key():
    image = torch.arange(1, 3073).remainder(251).add(1).to(torch.uint8).view(1, 3, 32, 32)
    data = Cifar(image, [4], augmented=True)
    padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
    padded[:, 4:36, 4:36] = image[0]
    seen = np.zeros((9, 9, 2), int)
    windows = {}
    for top in range(9):
        for left in range(9):
            window = padded[:, top : top + 32, left : left + 32]
            windows[window.numpy().tobytes()] = (top, left, 0)
            windows[window.flip(-1).numpy().tobytes()] = (top, left, 1)
    assert len(windows) == 162
    for key in range(4000):
        crop, label = data.keyed(0, key)
        assert label == 4
        seen[windows[crop.numpy().tobytes()]] += 1
    assert stats.chisquare(seen.reshape(-1)).pvalue > 1e-3
    assert torch.equal(data.keyed(0, 7)[0], data.keyed(0, 7)[0])


def test_validation_images_are_plain_and_prepare_normalises(tiny):
    train, validation = cifar10(tiny)
    assert torch.equal(validation.keyed(3, key=9)[0], validation.images[3])
    assert torch.equal(validation[3][0], validation.images[3])
    expected = (train.images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(train.prepare(train.images).double(), expected, rtol=0, atol=2e-6)

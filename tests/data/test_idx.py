"""MNIST's format: four files, gzipped or not, and one message for anything else."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onehour.data import idx as module
from onehour.data.idx import fashion_mnist, idx
from onehour.data.sources import load_data

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
TRAIN, TEST = 12, 5


def encoded(array: np.ndarray) -> bytes:
    """An IDX file of bytes."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def arrays(classes: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    found = {}
    for side, count in (("train", TRAIN), ("t10k", TEST)):
        found[f"{side}-images-idx3-ubyte"] = draw.integers(0, 256, (count, 6, 4), dtype=np.uint8)
        found[f"{side}-labels-idx1-ubyte"] = (np.arange(count) % classes).astype(np.uint8)
    return found


def written(folder: Path, changes: dict[str, bytes | None] | None = None, form: str = "{}") -> Path:
    """A folder with the four files, some of them changed or left out; gzipped where the form of their names says so."""
    folder.mkdir(exist_ok=True)
    files = {name: encoded(array) for name, array in arrays().items()} | (changes or {})
    for name, content in files.items():
        if content is not None:
            path = folder / form.format(name)
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return folder


@pytest.mark.parametrize("form", ["{}", "{}.gz", "emnist-balanced-{}.gz"])
def test_images_are_standardised_by_the_training_pixels_and_labels_are_as_they_are(tmp_path: Path, form: str):
    raw = arrays()
    mean, std = raw[FILES[0]].mean(), raw[FILES[0]].std(ddof=1)
    sides = idx(str(written(tmp_path, form=form)))
    for side, images, labels in zip(sides, FILES[::2], FILES[1::2], strict=True):
        expected = torch.from_numpy((raw[images][:, None] - mean) / std)
        torch.testing.assert_close(side.tensors[0].double(), expected, rtol=0, atol=1e-5)
        assert side.tensors[0].dtype == torch.float32
        assert side.tensors[1].tolist() == raw[labels].tolist()


def test_names_may_have_a_dot_and_say_test(tmp_path: Path):
    for name, array in arrays().items():
        (tmp_path / name.replace("-idx", ".idx").replace("t10k", "test")).write_bytes(encoded(array))
    train, validation = idx(str(tmp_path))
    assert (len(train), len(validation)) == (TRAIN, TEST)


def test_a_folder_is_data_whose_classes_are_those_of_its_labels(tmp_path: Path):
    """EMNIST's have 47 or 62."""
    labels = np.array([*range(TRAIN - 1), 46], np.uint8)
    data = load_data(str(written(tmp_path, {FILES[1]: encoded(labels)})))
    assert (len(data.train), len(data.validation), data.classes, data.channels) == (TRAIN, TEST, 47, 1)


def test_of_several_sets_in_a_folder_one_is_named_by_its_training_images(tmp_path: Path):
    for prefix in ("digits", "letters"):
        written(tmp_path, form=f"emnist-{prefix}-{{}}.gz")
    names = "emnist-digits-train-images-idx3-ubyte, emnist-letters-train-images-idx3-ubyte"
    with pytest.raises(ValueError, match=f"training images of several data sets; give the path of one of {names}"):
        load_data(str(tmp_path))
    for end in ("", ".gz"):
        data = load_data(str(tmp_path / f"emnist-letters-train-images-idx3-ubyte{end}"))
        assert len(data.train) == TRAIN


def test_fashion_mnist_is_known_by_its_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = written(tmp_path, form="{}.gz")
    with pytest.raises(ValueError, match="its SHA-256 is not the published one") as raised:
        load_data(f"fashion-mnist:{folder}")
    assert "apt install dataset-fashion-mnist" in str(raised.value)
    assert "https://github.com/zalandoresearch/fashion-mnist" in str(raised.value)
    known = {name: hashlib.sha256(encoded(array)).hexdigest() for name, array in arrays().items()}
    monkeypatch.setattr(module, "PUBLISHED", known)
    assert len(load_data(f"fashion-mnist:{folder}").train) == TRAIN
    written(tmp_path, {FILES[3]: encoded(np.zeros(TEST, np.uint8))}, form="{}.gz")
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz is damaged, or of another data set"):
        fashion_mnist(str(folder))


def test_the_published_digests_are_of_four_files():
    assert list(module.PUBLISHED) == FILES
    assert all(len(bytes.fromhex(digest)) == 32 for digest in module.PUBLISHED.values())


def test_without_a_folder_it_is_looked_for_where_debian_puts_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fashion_mnist, "__defaults__", ("/nowhere",))
    with pytest.raises(ValueError, match=r"^/nowhere/train-images-idx3-ubyte is not there.*apt install"):
        load_data("fashion-mnist")
    assert module.INSTALLED == "/usr/share/datasets/fashion-mnist"


IMAGES = encoded(arrays()[FILES[0]])
BAD = {
    "missing": (FILES[2], None, "t10k-images-idx3-ubyte is not there, and not as .gz either"),
    "empty": (FILES[0], b"", "is not an IDX file of bytes in 3 dimensions"),
    "another magic": (FILES[0], b"\1" + IMAGES[1:], "is not an IDX file of bytes in 3 dimensions"),
    "other elements": (FILES[0], b"\0\0\x0d\3" + IMAGES[4:], "is not an IDX file of bytes in 3 dimensions"),
    "labels as images": (FILES[0], encoded(arrays()[FILES[1]]), "is not an IDX file of bytes in 3 dimensions"),
    "half a header": (FILES[0], IMAGES[:10], "is not an IDX file of bytes in 3 dimensions"),
    "truncated": (FILES[0], IMAGES[:-1], "should have 304 bytes by its header, and has 303"),
    "extra": (FILES[0], IMAGES + b"\0", "should have 304 bytes by its header, and has 305"),
    "sizes beyond memory": (FILES[0], IMAGES[:4] + b"\xff" * 12, "by its header, and has 16"),
    "labels missing": (FILES[3], encoded(np.zeros(4, np.uint8)), "has 5 images, and there are 4 labels"),
    "no images": (FILES[0], encoded(np.zeros((0, 6, 4), np.uint8)), "has 0 images, and there are 12 labels"),
    "one shade": (FILES[0], encoded(np.full((TRAIN, 6, 4), 7, np.uint8)), "has only identical pixels"),
    "other sizes": (FILES[2], encoded(np.zeros((TEST, 4, 6), np.uint8)), r"shape \(1, 6, 4\), validation images"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_with_a_file_is_one_message(tmp_path: Path, name: str, content: bytes | None, message: str):
    with pytest.raises(ValueError, match=message) as raised:
        load_data(str(written(tmp_path, {name: content})))
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("damage", [lambda body: body[:-9], lambda body: b"hello", lambda body: body[:30] + body[34:]])
def test_a_damaged_gzip_is_one_message(tmp_path: Path, damage):
    path = written(tmp_path, form="{}.gz") / f"{FILES[0]}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz cannot be read: .*; expected four files"):
        idx(str(tmp_path))


def test_no_more_is_read_than_a_data_set_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Some kilobytes of gzip unpack to any size."""
    monkeypatch.setattr(module, "LARGEST", 300)
    with pytest.raises(ValueError, match="should have 304 bytes by its header, and has more than 300"):
        idx(str(written(tmp_path, form="{}.gz")))


@settings(max_examples=100)
@given(
    name=st.sampled_from(FILES),
    cut=st.integers(0, 320),
    places=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 255)), max_size=3),
    tail=st.binary(max_size=3),
)
def test_damaged_files_give_data_or_one_message(
    tmp_path_factory: pytest.TempPathFactory, name: str, cut: int, places: list[tuple[int, int]], tail: bytes
):
    body = bytearray(encoded(arrays()[name]))
    for place, value in places:
        body[place % len(body)] = value
    folder = written(tmp_path_factory.mktemp("idx"), {name: bytes(body)[:cut] + tail})
    try:
        train, _ = idx(str(folder))
    except ValueError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert torch.isfinite(train.tensors[0]).all()

"""Folders of images: labels by class name, every fault one message, and samples that depend on their key alone."""

import io
import os
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from onehour.data.images import MEAN, STD, Images, image_folder
from onehour.data.listing import Names
from onehour.data.loader import pass_batches, prepared
from onehour.data.samples import Keyed
from onehour.data.sources import Data, load_data
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream

CPU = torch.device("cpu")
CLASSES = ["a <b> class", "n01440764", "Zebra", "äöü"]
ZOO = [  # name, size (W, H), mode, format
    ("odd.jpg", (37, 23), "RGB", "JPEG"),
    ("one.JPEG", (1, 1), "RGB", "JPEG"),
    ("line.jpeg", (500, 1), "RGB", "JPEG"),
    ("grey.jpg", (40, 60), "L", "JPEG"),
    ("cmyk.jpg", (30, 30), "CMYK", "JPEG"),
    ("alpha <1>.png", (33, 20), "RGBA", "PNG"),
    ("palette.png", (20, 33), "P", "PNG"),
    ("deep.png", (24, 24), "I;16", "PNG"),
    ("a png.JPEG", (50, 41), "RGB", "PNG"),
]


def encoded(size: tuple[int, int], mode: str, kind: str, seed: int) -> bytes:
    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values[:, :, 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    """A folder of four classes: all of the zoo in each to train, two of it to validate."""
    root = tmp_path_factory.mktemp("image folder")
    for side, kinds in (("train", ZOO), ("val", ZOO[:2])):
        for label, name in enumerate(CLASSES):
            folder = root / side / name
            folder.mkdir(parents=True)
            for file, size, mode, kind in kinds:
                (folder / file).write_bytes(encoded(size, mode, kind, seed=label))
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two classes, one image each, to break."""
    for side in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / side / name).mkdir(parents=True)
            (tmp_path / side / name / "1.jpg").write_bytes(encoded((9, 9), "RGB", "JPEG", seed=0))
    return tmp_path


def test_classes_and_files_come_in_the_order_of_their_names(zoo):
    train, validation = image_folder(zoo)
    assert train.classes == validation.classes == sorted(CLASSES)
    assert (len(train), len(validation)) == (4 * len(ZOO), 8)
    expected = [os.path.join(zoo, "train", c, f) for c in sorted(CLASSES) for f in sorted(name for name, *_ in ZOO)]
    assert [train.source.name(i) for i in range(len(train))] == expected
    labels = [train[i][1] for i in range(len(train))]
    assert labels == [label for label in range(4) for _ in ZOO]
    assert all(type(label) is int for label in labels)


def test_every_kind_of_image_is_a_sample(zoo):
    for dataset in image_folder(zoo):
        for i in range(len(dataset)):
            image, _ = dataset.keyed(i, key=i)
            assert (image.dtype, image.shape) == (torch.uint8, (3, 224, 224))


def test_crops_depend_on_the_key_alone(zoo):
    train, validation = image_folder(zoo)
    first = train.keyed(0, key=1)[0]
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(train.keyed(0, key=1)[0], first)
    assert not torch.equal(train.keyed(0, key=2)[0], first)
    assert torch.equal(validation.keyed(0, key=1)[0], validation.keyed(0, key=2)[0])


def test_the_loader_keys_a_sample_by_seed_epoch_and_index_and_leaves_generators_alone(zoo):
    train, _ = image_folder(zoo)
    before = random.getstate(), torch.get_rng_state(), repr(np.random.get_state())
    image, label = Keyed(train, seed=3)[(2, 7)]
    assert (before[0], before[2]) == (random.getstate(), repr(np.random.get_state()))
    assert torch.equal(before[1], torch.get_rng_state())
    expected = train.keyed(7, seed_for(3, "sample", 2, 7))
    assert torch.equal(image, expected[0])
    assert label == expected[1]


def test_batches_are_normalised_floats_of_the_images_bytes(zoo):
    train, _ = image_folder(zoo)
    stream = SampleStream(samples=len(train), minibatch=8, seed=3)
    images, labels = next(pass_batches(train, stream, [range(1)], start=0, stop=1, loaders=0, device=CPU))
    assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (8, 3, 224, 224), torch.int64)
    assert images.is_contiguous()
    epochs, indices = stream.epochs_and_indices(0)
    raw = torch.stack(
        [train.keyed(i, seed_for(3, "sample", e, i))[0] for e, i in zip(epochs.tolist(), indices.tolist(), strict=True)]
    )
    expected = (raw.double() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(images, prepared(train, raw))


def test_a_folder_is_data_that_a_recipe_can_name(zoo):
    data = load_data(str(zoo))
    assert (len(data.train), data.classes, data.channels) == (4 * len(ZOO), 4, 3)


def test_bytes_without_a_prepare_are_refused_as_before(zoo):
    class Bytes(Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int):
            return torch.zeros(3, 4, 4, dtype=torch.uint8), 0

    with pytest.raises(ValueError, match=r"training data's images are torch\.uint8; expected float tensors"):
        Data.of(Bytes(), Bytes())


def test_names_survive_whatever_bytes_they_have():
    names = ["a", "", "ä <b>", "x" * 300, os.fsdecode(b"\xff\xfe.jpg")]
    packed = Names.of(iter(names))
    assert [packed[i] for i in range(len(packed))] == names


def test_a_million_names_cost_little_more_than_their_bytes():
    names = Names.of(f"n01440764_{i}.JPEG" for i in range(100_000))
    assert names.buffer.nbytes + names.ends.nbytes < 30 * 100_000
    assert len(pickle.dumps(names)) < 30 * 100_000


def test_hidden_files_and_folders_are_passed_over(small):
    (small / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (small / "train" / ".cache").mkdir()
    train, _ = image_folder(small)
    assert (train.classes, len(train)) == (["cat", "dog"], 2)


def test_links_are_followed(small):
    (small / "train" / "cat" / "2.jpg").symlink_to(small / "val" / "cat" / "1.jpg")
    assert len(image_folder(small)[0]) == 3


@pytest.mark.parametrize("missing", ["", "train", "val"])
def test_a_missing_folder_is_named_with_what_is_expected(small, missing):
    root = small / "nowhere" if not missing else small
    if missing:
        (small / missing).rename(small / "other")
    said = f"{root / missing} is not a folder" if missing else f"there is no folder {root}"
    expected = f"{said}; expected {root}/train/CLASS/* and {root}/val/CLASS/*"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        image_folder(root)


@pytest.mark.parametrize("side", ["train", "val"])
def test_a_folder_without_classes_is_named(small, side):
    (small / side).rename(small / "away")
    (small / side).mkdir()
    (small / side / "1.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(f"{small / side} has no folders; expected one for each class")):
        image_folder(small)


def test_classes_without_images_are_each_named(small):
    for name in ("a <b>", "c d"):
        (small / "train" / name).mkdir()
    expected = r"train/a <b> holds no images; add some, or remove .* \(2 more; `onehour data doctor .*` lists them\)"
    with pytest.raises(ValueError, match=expected):
        image_folder(small)


def test_unknown_and_missing_validation_classes_are_each_named(small):
    (small / "val" / "cat").rename(small / "val" / "a <b>")
    for name in ("e f", "g"):
        (small / "train" / name).mkdir()
        (small / "train" / name / "1.jpg").write_bytes(b"")
    message = "val has 'a <b>', which .*/train has not and lacks 'cat', 'e f', 'g'; expected the same class folders"
    with pytest.raises(ValueError, match=message):
        image_folder(small)


def test_another_source_needs_its_labels_names_and_bytes():
    class Memory:
        classes, labels = ["x"], np.zeros(1, np.int32)

        def name(self, index: int) -> str:
            return f"memory {index}"

        def read(self, index: int) -> bytes:
            return encoded((9, 9), "RGB", "PNG", seed=index)

    assert Images(Memory(), augmented=True).keyed(0, key=1)[0].shape == (3, 224, 224)

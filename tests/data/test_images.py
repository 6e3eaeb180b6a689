"""Folders of images: labels by class name, every fault one message, and samples that depend on their key alone."""

import os
import pickle
import random
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import images
import numpy as np
import pytest
import torch

from onehour.data.images import MEAN, STD, ImageOptions, image_folder
from onehour.data.listing import Names
from onehour.data.loader import Feed, prepared
from onehour.data.samples import Keyed
from onehour.data.sources import load_data
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream

CPU = torch.device("cpu")
CLASSES = ("a <b> class", "n01440764", "Zebra", "äöü")
NAMES = ["rgb.png", "baseline.jpg", "grey.jpg", "cmyk.jpg", "rgba.png", "palette.png", "grey16.png", "Zebra <1>.JPEG"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes of files of all modes and of odd sizes to train, and two of each to validate."""
    root = tmp_path_factory.mktemp("image folder")
    for side, names in (("train", NAMES), ("val", NAMES[:2])):
        for number, name in enumerate(CLASSES):
            (root / side / name).mkdir(parents=True)
            kinds = images.zoo([(37, 23), (1, 1), (500, 1), (30, 30)][number])
            for file in names:
                (root / side / name / file).write_bytes(kinds.get(file, kinds["rgb.png"]))
    return root


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two classes, one image each, to break."""
    return images.tree(tmp_path / "data", train=1, val=1, classes=("cat", "dog"))


def test_classes_and_files_come_in_the_order_of_their_names(zoo: Path):
    train, validation = image_folder(zoo)
    assert train.classes == validation.classes == sorted(CLASSES)
    assert (len(train), len(validation)) == (4 * len(NAMES), 8)
    expected = [os.path.join(zoo, "train", c, f) for c in sorted(CLASSES) for f in sorted(NAMES)]
    assert [train.source.name(i) for i in range(len(train))] == expected
    labels = [train[i][1] for i in range(len(train))]
    assert labels == [label for label in range(4) for _ in NAMES]
    assert all(type(label) is int for label in labels)
    data = load_data(str(zoo))
    assert (len(data.train), data.classes, data.channels) == (4 * len(NAMES), 4, 3)


def test_every_kind_of_image_is_a_sample_that_depends_on_its_key_alone(zoo: Path):
    for dataset in image_folder(zoo):
        for i in range(len(dataset)):
            image, _ = dataset.keyed(i, key=i)
            assert (image.dtype, image.shape) == (torch.uint8, (3, 224, 224))
    train, validation = image_folder(zoo)
    last = len(train) - 1
    first = train.keyed(last, key=1)[0]
    random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(train.keyed(last, key=1)[0], first)
    assert not torch.equal(train.keyed(last, key=2)[0], first)
    assert torch.equal(validation.keyed(0, key=1)[0], validation.keyed(0, key=2)[0])


def test_the_loader_keys_a_sample_by_seed_epoch_and_index_and_leaves_generators_alone(zoo: Path):
    train, _ = image_folder(zoo)
    before = random.getstate(), torch.get_rng_state(), repr(np.random.get_state())
    image, label = Keyed(train, seed=3)[(2, 7)]
    assert (before[0], before[2]) == (random.getstate(), repr(np.random.get_state()))
    assert torch.equal(before[1], torch.get_rng_state())
    expected = train.keyed(7, seed_for(3, "sample", 2, 7))
    assert torch.equal(image, expected[0])
    assert label == expected[1]


def test_batches_are_normalised_floats_of_the_images_bytes(zoo: Path):
    train, _ = image_folder(zoo)
    stream = SampleStream(samples=len(train), minibatch=8, seed=3)
    feed = Feed(train, seed=3, loaders=0, device=CPU, stream=stream)
    images, labels = next(feed.passes([range(1)], start=0, stop=1))
    assert (images.dtype, images.shape, labels.dtype) == (torch.float32, (8, 3, 224, 224), torch.int64)
    assert images.is_contiguous()
    epochs, indices = (array.tolist() for array in stream.epochs_and_indices(0))
    keys = [seed_for(3, "sample", epoch, index) for epoch, index in zip(epochs, indices, strict=True)]
    raw = torch.stack([train.keyed(index, key)[0] for index, key in zip(indices, keys, strict=True)])
    expected = (raw.double() / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(images, prepared(train, raw))


def test_a_transform_takes_the_place_of_the_training_crop_whoever_loads(tmp_path: Path):
    root = images.tree(tmp_path / "data", train=4, val=1)
    train, _ = image_folder(root, ImageOptions(train_transform="images:noisy"))
    stream = SampleStream(samples=12, minibatch=4, seed=3)
    batches: list[list[torch.Tensor]] = []
    for loaders, start in ((0, 0), (2, 0), (1, 3)):
        with closing(Feed(train, seed=3, loaders=loaders, device=CPU, stream=stream)) as feed:
            batches.append([images for images, _ in feed.passes([range(1)], start=start, stop=5)])
    assert batches[0][0].shape == (4, 3, 8, 8)
    assert all(map(torch.equal, batches[0], batches[1]))
    assert all(map(torch.equal, batches[0][3:], batches[2]))
    assert not torch.equal(train.keyed(0, key=1)[0], train.keyed(0, key=2)[0])


def test_other_sizes_are_cropped_and_a_recipe_says_so(small: Path):
    with pytest.raises(ValueError, match="test_resize is 90; expected at least image_size, 96"):
        ImageOptions(image_size=96, test_resize=90)
    assert (ImageOptions().shorter, ImageOptions(image_size=96).shorter) == (256, 110)
    for side in image_folder(small, ImageOptions(image_size=96, test_resize=100)):
        assert side[0][0].shape == (3, 96, 96)
        assert side.facts.items() >= {"image_size": 96, "test_resize": 100, "train_transform": ""}.items()


def test_names_of_any_bytes_cost_little_more_than_these():
    names = ["a", "", "ä <b>", "x" * 300, os.fsdecode(b"\xff\xfe.jpg")]
    packed = Names.of(iter(names))
    assert [packed[i] for i in range(len(packed))] == names
    many = Names.of(f"n01440764_{i}.JPEG" for i in range(100_000))
    assert many.buffer.nbytes + many.ends.nbytes < 30 * 100_000
    assert len(pickle.dumps(many)) < 30 * 100_000


def test_hidden_files_and_folders_are_passed_over_and_links_followed(small: Path):
    (small / "train" / "cat" / ".DS_Store").write_bytes(b"x")
    (small / "train" / ".cache").mkdir()
    (small / "train" / "cat" / "2.jpg").symlink_to(small / "val" / "cat" / "0000.JPEG")
    train, _ = image_folder(small)
    assert (train.classes, len(train)) == (["cat", "dog"], 3)


def without_classes(root: Path, side: str) -> None:
    (root / side).rename(root / "away")
    (root / side).mkdir()
    (root / side / "1.jpg").write_bytes(b"")


def other_classes(root: Path) -> None:
    (root / "val" / "cat").rename(root / "val" / "a <b>")
    for name in ("e f", "g"):
        (root / "train" / name).mkdir()
        (root / "train" / name / "1.jpg").write_bytes(b"")


EXPECTED = "; expected ROOT/train/CLASS/* and ROOT/val/CLASS/*"


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (lambda root: root.rename(f"{root}-away"), f"there is no folder ROOT{EXPECTED}"),
        (lambda root: (root / "train").rename(root / "other"), f"ROOT/train is not a folder{EXPECTED}"),
        (lambda root: (root / "val").rename(root / "other"), f"ROOT/val is not a folder{EXPECTED}"),
        (lambda root: without_classes(root, "train"), "ROOT/train has no folders; expected one for each class"),
        (lambda root: without_classes(root, "val"), "ROOT/val has no folders; expected one for each class"),
        (
            lambda root: [(root / "train" / name).mkdir() for name in ("a <b>", "c d")],
            "ROOT/train/a <b> holds no images; add some, or remove … (2 more; `onehour data doctor ROOT` lists them)",
        ),
        (
            other_classes,
            "ROOT/val has 'a <b>', which ROOT/train has not and lacks 'cat', 'e f', 'g'; expected the same class",
        ),
    ],
)
def test_a_folder_that_is_not_as_expected_is_one_message(small: Path, happens: Callable[[Path], object], said: str):
    happens(small)
    begin, _, rest = said.replace("ROOT", str(small)).partition(" … ")
    with pytest.raises(ValueError, match=f"^{re.escape(begin)}.*{re.escape(rest)}"):
        image_folder(small)

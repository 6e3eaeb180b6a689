"""The embedded task: real digits, divided before anything is made of them, the same on every machine."""

import hashlib

import numpy as np
import pytest
import torch

from onehour.data.digits import SAMPLES, digits, originals

WIDE = SAMPLES["digits-wide"]


def test_the_originals_are_ucis():
    images, labels = originals()
    assert images.shape == (1797, 1, 8, 8)
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert images.min() == 0
    assert images.max() == 1
    assert torch.equal(images * 16, (images * 16).round())
    # The first digit of the file is this zero.
    assert (images[0, 0, 2] * 16).tolist() == [0, 3, 15, 2, 0, 11, 8, 0]


def test_the_originals_are_those_that_scikit_learn_ships():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    images, labels = originals()
    np.testing.assert_array_equal((images[:, 0] * 16).numpy(), theirs.images)
    np.testing.assert_array_equal(labels.numpy(), theirs.target)


def test_sizes_types_and_classes():
    train, validation = digits()
    for side, count in ((train, 8192), (validation, 4096)):
        images, labels = side.tensors
        assert images.shape == (count, 1, 8, 8)
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        shares = torch.bincount(labels) / count
        assert len(shares) == 10
        assert shares.min() > 0.06
        assert shares.max() < 0.14
        assert len({row.numpy().tobytes() for row in images}) == len(images)


def test_training_images_are_standardised_and_validation_by_the_same_numbers():
    train, validation = (side.tensors[0] for side in digits())
    assert abs(train.mean()) < 1e-4
    assert abs(train.std() - 1) < 1e-4
    assert abs(validation.mean()) < 0.1
    assert abs(validation.std() - 1) < 0.1


def test_the_same_call_gives_the_same_bits_and_no_global_generator_matters():
    torch.manual_seed(1)
    first = digits()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = digits()
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.tensors[0], b.tensors[0])
        assert torch.equal(a.tensors[1], b.tensors[1])


@pytest.mark.parametrize(
    ("split", "known"), [(0, ["2b1111ac87b0", "fef6e68f0316"]), (1, ["1d3937b03ad0", "dfdbdcd75d0c"])]
)
def test_the_labels_of_a_split_never_change(split: int, known: list[str]):
    """Whole numbers alone decide them, so they are the same on any machine and with any release."""
    found = [hashlib.sha256(side.tensors[1].numpy().tobytes()).hexdigest()[:12] for side in digits(split)]
    assert found == known


def test_no_original_serves_both_sides():
    """With neither distortion nor noise every sample is an original; the two sides have none in common."""
    from onehour.data import digits as module

    kept = {name: getattr(module, name) for name in ("ROTATION", "SCALE", "SHIFT", "NOISE")}
    try:
        for name in kept:
            setattr(module, name, 0.0)
        sides = [{row.round(decimals=3).numpy().tobytes() for row in side.tensors[0]} for side in digits()]
    finally:
        for name, value in kept.items():
            setattr(module, name, value)
    assert [len(side) for side in sides] == [1437, 360]
    assert not sides[0] & sides[1]


def test_the_wide_task_has_four_times_the_samples_of_the_same_originals():
    """The validation composites are those of digits, in the units of another mean and deviation."""
    train, validation = digits(samples=WIDE)
    narrow, expected = digits()
    images, labels = train.tensors
    assert images.shape == (32768, 1, 8, 8)
    assert torch.equal(labels[:8192], narrow.tensors[1])
    assert abs(images.mean()) < 1e-4
    assert abs(images.std() - 1) < 1e-4
    assert len({row.numpy().tobytes() for row in images}) == len(images)
    assert torch.equal(validation.tensors[1], expected.tensors[1])
    pixels, known = validation.tensors[0], expected.tensors[0]
    torch.testing.assert_close((pixels - pixels.mean()) / pixels.std(), (known - known.mean()) / known.std())


def test_a_split_divides_the_originals_otherwise_and_the_wide_tasks_alike():
    assert not torch.equal(digits(0)[1].tensors[1], digits(1)[1].tensors[1])
    assert torch.equal(digits(3, samples=WIDE)[1].tensors[1], digits(3)[1].tensors[1])
    assert not torch.equal(digits(3, samples=WIDE)[1].tensors[1], digits(samples=WIDE)[1].tensors[1])


@pytest.mark.parametrize("samples", [1, 1437, 5000])
def test_any_number_of_training_samples_begins_with_the_same_originals(samples: int):
    train, validation = digits(samples=samples)
    assert len(train) == samples
    assert torch.equal(train.tensors[1], digits(samples=WIDE)[0].tensors[1][:samples])
    assert len(validation) == 4096

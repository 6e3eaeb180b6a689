"""§5.1: the crops, the flip and the normalisation, each a pure function of the image and one key."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from onehour.data.augment import TRIALS, Crop, TrainTransform, draw_crop, normalise, training_crop, validation_crop
from onehour.data.dataset import seed_generators

RANDOM = np.random.default_rng(0)
SIDES = st.integers(1, 3000)
KEYS = st.integers(0, 2**63 - 1)
SIZES = [(375, 500), (500, 375), (224, 224), (64, 65), (1, 1), (1, 500), (500, 1), (3, 7), (1200, 900)]


def picture(height: int, width: int) -> np.ndarray:
    return RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8)


def array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy().astype(int)


def crops(height: int, width: int, count: int = 4000) -> list[Crop]:
    return [draw_crop(height, width, key) for key in range(count)]


def pvalue(result: Any) -> float:
    return result.pvalue  # scipy's stubs do not know it


def torchvisions(height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params, transcribed with its own generator."""
    for _ in range(10):
        area = height * width * draw.uniform(0.08, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draw.randint(0, height - h), draw.randint(0, width - w), h, w
    ratio = width / height
    if ratio < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif ratio > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


# Values of the first release: a change would give every recorded run other images.
def test_the_crops_of_some_keys_are_pinned():
    assert [tuple(draw_crop(375, 500, key)) for key in (0, 1, 2**63 - 1)] == [
        (62, 144, 266, 213, True),
        (57, 136, 144, 166, True),
        (81, 246, 208, 223, False),
    ]


@given(SIDES, SIDES, KEYS)
def test_a_crop_lies_in_the_image_and_in_the_papers_range(height, width, key):
    crop = draw_crop(height, width, key)
    assert crop == draw_crop(height, width, key)
    assert 0 <= crop.top <= crop.top + crop.height <= height
    assert 0 <= crop.left <= crop.left + crop.width <= width
    assert min(crop.height, crop.width) >= 1
    # Sides are rounded, so by half a pixel the range may be left.
    low, high = (crop.width - 0.5) / (crop.height + 0.5), (crop.width + 0.5) / (crop.height - 0.5)
    assert low <= 4 / 3 + 1e-12
    assert high >= 3 / 4 - 1e-12
    fallback = crop.height == height or crop.width == width
    assert fallback or (crop.height + 0.5) * (crop.width + 0.5) >= 0.08 * height * width


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 500), (400, 1000), (900, 300)])
def test_crops_are_distributed_as_torchvisions(height, width):
    ours, draw = crops(height, width), random.Random(1)
    theirs = [torchvisions(height, width, draw) for _ in ours]

    def spread(values) -> list[tuple[float, ...]]:
        rows = [(h * w, math.log(w / h), t / max(1, height - h), x / max(1, width - w)) for t, x, h, w in values]
        return list(zip(*rows, strict=True))

    for mine, other in zip(spread(crop[:4] for crop in ours), spread(theirs), strict=True):
        assert pvalue(stats.ks_2samp(mine, other)) > 1e-3


def test_area_is_uniform_and_aspect_log_uniform_where_every_try_fits():
    # A crop of at most half of a square's area always fits, and below that the first try is the one taken.
    small = [crop for crop in crops(1000, 1000, 6000) if crop.height * crop.width < 0.5e6]
    areas = np.array([crop.height * crop.width / 1e6 for crop in small])
    aspects = np.array([math.log(crop.width / crop.height) for crop in small])
    assert pvalue(stats.kstest(areas, stats.uniform(0.08, 0.42).cdf)) > 1e-3
    assert pvalue(stats.kstest(aspects, stats.uniform(-math.log(4 / 3), 2 * math.log(4 / 3)).cdf)) > 1e-3


def test_half_of_the_crops_are_flipped_whatever_else_they_are():
    drawn = crops(375, 500)
    flips = np.array([crop.flip for crop in drawn])
    assert pvalue(stats.binomtest(int(flips.sum()), len(flips))) > 1e-3
    areas = np.array([crop.height * crop.width for crop in drawn])
    assert pvalue(stats.ks_2samp(areas[flips], areas[~flips])) > 1e-3


def test_no_try_fits_a_line_so_its_centre_is_taken():
    assert {crop[:4] for crop in crops(3, 500, 50)} == {(0, 248, 3, 4)}
    assert {crop[:4] for crop in crops(500, 3, 50)} == {(248, 0, 4, 3)}
    assert {crop[:4] for crop in crops(1, 1, 50)} == {(0, 0, 1, 1)}


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_training_crops_have_the_pixels_of_pillows_crop_and_resize(rows, columns):
    image = picture(rows, columns)
    for key in range(8):
        top, left, height, width, flip = draw_crop(rows, columns, key)
        part = Image.fromarray(image[top : top + height, left : left + width])
        size = 96 if key == 7 else 224
        expected = np.asarray(part.resize((size, size), Image.Resampling.BILINEAR)).astype(int)
        expected = expected[:, ::-1] if flip else expected
        ours = training_crop(image, key, size)
        assert (ours.shape, ours.dtype) == ((3, size, size), torch.uint8)
        assert np.abs(array(ours) - expected).max() <= 1


@pytest.mark.parametrize("size", [*SIZES, (16, 255), (100, 1599)])
@pytest.mark.parametrize(("side", "resize"), [(224, 256), (95, 110)])
def test_validation_crops_have_the_pixels_of_pillows_resize_and_crop(size, side, resize):
    height, width = size
    image = picture(height, width)
    if max(size) > 16 * min(size):
        image = image[:, 242:258] if height == 1 else image[242:258]
        height, width = image.shape[:2]
    shorter = min(height, width)
    height, width = int(resize * height / shorter), int(resize * width / shorter)
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    top, left = round((height - side) / 2), round((width - side) / 2)
    ours = validation_crop(image, side, resize)
    assert (ours.shape, ours.dtype) == ((3, side, side), torch.uint8)
    assert np.abs(array(ours) - resized[top : top + side, left : left + side]).max() <= 1


def test_a_line_of_ten_thousand_pixels_is_cropped_from_its_centre():
    line = np.zeros((1, 10_000, 3), np.uint8)
    line[:, 4990:5010] = 200
    assert validation_crop(line).min() == 200
    assert validation_crop(line.transpose(1, 0, 2).copy()).min() == 200


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(1, 60), KEYS)
def test_any_size_gives_an_image_that_no_global_generator_decides(height, width, key):
    image = np.arange(height * width * 3, dtype=np.uint32).astype(np.uint8).reshape(height, width, 3)
    torch.manual_seed(0)
    first = training_crop(image, key)
    torch.manual_seed(1)
    state = torch.get_rng_state(), random.getstate()
    assert torch.equal(training_crop(image, key), first)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalisation_is_the_equation_and_keeps_the_layout(layout):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    images = torch.randint(0, 256, (4, 3, 8, 6), dtype=torch.uint8).contiguous(memory_format=layout)
    expected = (images.double() / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    ours = normalise(images, mean, std)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(normalise(images[1:2], mean, std), ours[1:2])


def transform(function: Any, monkeypatch: pytest.MonkeyPatch) -> TrainTransform:
    monkeypatch.setattr("onehour.data.augment.resolve", lambda what, spec: function)
    return TrainTransform("mine:transform")


PICTURE = picture(9, 12)


@pytest.mark.parametrize(
    "kind", [lambda image: image, Image.fromarray, lambda image: torch.from_numpy(image).permute(2, 0, 1)]
)
def test_a_transform_returns_an_array_a_picture_or_a_tensor(kind, monkeypatch: pytest.MonkeyPatch):
    made = transform(lambda image: kind(image[2:5, ::-1].copy()), monkeypatch)(PICTURE, 7)
    assert made.dtype == torch.uint8
    assert np.array_equal(array(made), PICTURE[2:5, ::-1])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda image: image / 255, r"returned torch.float64 \(3, 9, 12\); expected uint8: an array \(H, W, 3\)"),
        (lambda image: torch.from_numpy(image), r"returned torch.uint8 \(9, 12, 3\); expected uint8"),
        (lambda image: Image.fromarray(image).convert("L"), r"returned torch.uint8 \(9, 12\); expected uint8"),
        (lambda image: {"image": image}, "returned dict; expected uint8"),
        (lambda image: 1 / 0, r"failed: ZeroDivisionError: division by zero \(.*test_augment\.py:\d+\)"),
        (
            lambda image: image + RANDOM.integers(9, dtype=np.uint8),
            "different images from one image under the same seeds",
        ),
    ],
)
def test_what_a_transform_must_not_do_is_one_message(function, message: str, monkeypatch: pytest.MonkeyPatch):
    made = transform(function, monkeypatch)
    with pytest.raises(ValueError, match=f"^train_transform mine:transform .*{message}"):
        list(map(made, [PICTURE] * TRIALS, range(TRIALS)))


def test_a_transform_that_is_no_function_by_name_is_one_message():
    for spec, message in (("augment", "expected package.module:function"), ("math:augment", "math has no 'augment'")):
        with pytest.raises(ValueError, match=f"train_transform .*{message}"):
            TrainTransform(spec)


@pytest.mark.vision
@pytest.mark.parametrize("library", ["torchvision", "albumentations"])
def test_libraries_transforms_are_keyed_as_the_recipes_page_has_them(library: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for newer ones
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (block,) = (found for found in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if library in found)
    names: dict[str, Any] = {}
    exec(block, names)
    made = transform(names["augment"], monkeypatch)
    first = [made(PICTURE.copy(), key) for key in range(TRIALS + 2)]
    seed_generators(5)
    made = transform(names["augment"], monkeypatch)  # as in another process
    assert all(torch.equal(made(PICTURE.copy(), key), image) for key, image in enumerate(first))
    assert len({image.numpy().tobytes() for image in first}) > TRIALS
    assert {tuple(image.shape) for image in first} == {(3, 224, 224)}

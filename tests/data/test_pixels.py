"""The pixels of every format are those of Pillow's full decode and antialiased resize (the issue's tolerance)."""

import io
import warnings

import numpy as np
import pytest
from images import picture, saved, zoo
from PIL import Image, ImageOps

from onehour.config import Recipe
from onehour.data.augment import SIZE, draw_crop, training_crop, validation_crop
from onehour.data.dataset import FaultError
from onehour.data.decode import PIXELS, decode, orientation_of, oriented

NAMES = sorted(zoo((8, 8)))


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return zoo((301, 243))


def pillow(data: bytes) -> Image.Image:
    """The rule to RGB, in Pillow's own words."""
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):  # of 16 bits the upper 8
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode == "P":
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


@pytest.mark.parametrize("name", NAMES)
def test_crops_are_pillows(files: dict[str, bytes], name: str):
    """Of a training crop and of the test crop."""
    image, pixels = pillow(files[name]), decode(files[name], name)
    top, left, height, width, flip = draw_crop(image.height, image.width, key=1)
    theirs = image.crop((left, top, left + width, top + height)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pairs = [(training_crop(pixels, key=1), ImageOps.mirror(theirs) if flip else theirs)]
    shorter = min(image.size)
    theirs = image.resize((256 * image.width // shorter, 256 * image.height // shorter), Image.Resampling.BILINEAR)
    left, top = round((theirs.width - SIZE) / 2), round((theirs.height - SIZE) / 2)
    pairs.append((validation_crop(pixels), theirs.crop((left, top, left + SIZE, top + SIZE))))
    for ours, theirs in pairs:
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - np.asarray(theirs).astype(int))
        assert difference.mean() <= 0.05
        assert difference.max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_images_only_where_asked(kind: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(picture(1), kind, exif=exif, **options)
    assert orientation_of(data) == (1 if kind == "TIFF" else orientation)  # a TIFF's own is followed either way
    plain, turned = decode(data, "x"), decode(data, "x", exif=True)
    assert plain.shape == (turned.shape if kind == "TIFF" else (47, 61, 3))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray((image if kind == "TIFF" else ImageOps.exif_transpose(image)).convert("RGB"))
    assert turned.shape == expected.shape
    assert np.abs(turned.astype(int) - expected).max() <= 1
    assert turned.flags.c_contiguous


@pytest.mark.parametrize("value", [0, 9, 255, 65535])
def test_an_orientation_that_is_none_leaves_the_image(value: int):
    exif = Image.Exif()
    exif[0x0112] = value
    data = saved(picture(1), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(data, "x", exif=True), decode(data, "x"))
    np.testing.assert_array_equal(oriented(decode(data, "x"), 0), decode(data, "x"))


@pytest.mark.parametrize("name", NAMES)
def test_the_cap_is_asked_before_anything_is_decoded(files: dict[str, bytes], name: str):
    pixels = 301 * 243 * {"webp": 2, "jp2": 4}.get(name.rpartition(".")[2], 1)
    assert decode(files[name], name, pixels=pixels).shape == (243, 301, 3)
    with pytest.raises(FaultError, match=rf"^{name} has 301×243 pixels, more than the cap of .*; remove it, make it"):
        decode(files[name], name, pixels=pixels - 1)


def test_the_recipes_cap_is_the_decoders():
    assert Recipe().pixel_cap == PIXELS


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP"])
def test_odd_sizes_are_images(size: tuple[int, int], kind: str):
    pixels = decode(saved(picture(1, size), kind), "x")
    assert pixels.shape == (size[1], size[0], 3)
    assert training_crop(pixels, 1).shape == validation_crop(pixels).shape == (3, SIZE, SIZE)

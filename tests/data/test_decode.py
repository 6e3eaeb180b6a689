"""Any image file's bytes become RGB under one rule, or one error that names the file."""

import io
import struct
import zlib

import numpy as np
import pytest
from images import chunk, png16, saved, smooth
from PIL import Image, PngImagePlugin

from onehour.data.decode import decode, orientation_of, shrunk
from onehour.data.doctor import inspect_image

RANDOM = np.random.default_rng(0)
GREY16 = np.array([[0, 255, 256, 40000, 65535]], np.uint16)


def pixels(height: int, width: int, bands: int = 3) -> np.ndarray:
    return RANDOM.integers(0, 256, (height, width, bands), dtype=np.uint8)


def jpeg(height: int = 23, width: int = 37, **options) -> bytes:
    return saved(Image.fromarray(pixels(height, width)), "JPEG", **options)


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (8, 8), (23, 37), (121, 90)])
@pytest.mark.parametrize("options", [{}, {"quality": 100, "subsampling": 0}, {"progressive": True}, {"optimize": True}])
def test_jpegs_have_pillows_pixels(size, options):
    data = jpeg(*size, **options)
    decoded = decode(data, "x")
    assert decoded.dtype == np.uint8
    assert decoded.shape == (*size, 3)
    assert np.abs(decoded.astype(int) - pillow(data)).max() <= 1


def test_jpegs_of_other_modes_keep_their_colours():
    for mode in ("L", "CMYK"):
        data = saved(Image.fromarray(pixels(23, 37)).convert(mode), "JPEG")
        np.testing.assert_array_equal(decode(data, "x"), pillow(data))
    data = saved(Image.new("RGB", (16, 16), (250, 10, 60)), "JPEG", keep_rgb=True, quality=100)
    assert np.abs(decode(data, "x").astype(int) - [250, 10, 60]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_give_the_pixels_themselves(kind):
    image = pixels(19, 31)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(saved(Image.fromarray(image), kind, **options), "x"), image)


def test_transparency_is_dropped_and_the_colours_below_it_stay():
    image = pixels(5, 6, 4)
    np.testing.assert_array_equal(decode(saved(Image.fromarray(image), "PNG"), "x"), image[:, :, :3])
    grey = pixels(5, 6, 2)
    decoded = decode(saved(Image.fromarray(grey, "LA"), "PNG"), "x")
    np.testing.assert_array_equal(decoded, np.repeat(grey[:, :, :1], 3, 2))


@pytest.mark.parametrize("options", [{}, {"transparency": 1}, {"transparency": bytes([0, 120, 255])}])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes_are_looked_up(kind, options):
    colours = [(255, 0, 0), (0, 200, 10), (3, 5, 250)]
    image = Image.new("P", (3, 1))
    image.putpalette([value for colour in colours for value in colour])
    image.putdata([0, 1, 2])
    if kind == "GIF" and isinstance(options.get("transparency"), bytes):
        options = {}
    assert decode(saved(image, kind, **options), "x").tolist() == [[list(colour) for colour in colours]]


def test_black_and_white_is_0_and_255():
    image = Image.fromarray(np.array([[True, False, True]]))
    assert decode(saved(image, "PNG"), "x")[:, :, 0].tolist() == [[255, 0, 255]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_of_16_bits_the_upper_8_are_taken(kind):
    decoded = decode(saved(Image.fromarray(GREY16), kind), "x")
    np.testing.assert_array_equal(decoded, np.repeat((GREY16 >> 8).astype(np.uint8)[:, :, None], 3, 2))
    np.testing.assert_array_equal(decode(png16(), "x"), smooth(61, 47, 0))  # of three channels


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
        assert decode(data, "x")[0, 0].tolist() == [255, 0, 0]


def test_bytes_between_segments_and_behind_the_image_do_no_harm():
    data = jpeg()
    whole = decode(data, "x")
    at = data.index(b"\xff\xc0")
    np.testing.assert_array_equal(decode(data[:at] + b"\0\0" + data[at:], "x"), whole)
    np.testing.assert_array_equal(decode(data + b"rubbish", "x"), whole)


def test_metadata_that_cannot_be_read_does_no_harm():
    data = saved(Image.new("CMYK", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert decode(data, "x").shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x.jpg is an empty file"),
        (b"hello", "x.jpg is not a readable image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x.jpg is not a readable image"),
        (b"\xff\xd8", "x.jpg is not a readable image"),
        (jpeg()[:300], "x.jpg cannot be decoded"),
        (jpeg()[:-40], "x.jpg cannot be decoded: .*truncated.*; replace or remove it"),
        (saved(Image.fromarray(pixels(9, 9)), "PNG")[:-60], "x.jpg cannot be decoded"),
        (saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floating-point"),
        (saved(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF"), "70000; expected 8 or 16 bits"),
    ],
)
def test_what_is_no_whole_image_is_one_error_with_its_name(data, message):
    with pytest.raises(ValueError, match=message) as raised:
        decode(data, "x.jpg")
    assert "\n" not in str(raised.value)
    assert "BytesIO" not in str(raised.value)


@pytest.mark.parametrize(
    "metadata",
    [
        chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"x" * 1_200_000)),
        chunk(b"zTXt", b"parameters\0\7?"),
        chunk(b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(b"x" * 1_200_000)),
        chunk(b"iTXt", b"p"),
        chunk(b"tEXt", b"parameters\0" + b"x" * 70_000_000),
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(1_500_000))),
        chunk(b"iCCP", b""),
        chunk(b"gAMA", b"1"),
        chunk(b"eXIf", b"?"),
        chunk(b"tEXt", b"a\0b")[:-4] + b"????",
    ],
    ids=["text", "a method", "itext", "a short itext", "70 MB", "a profile", "no profile", "a gamma", "exif", "a CRC"],
)
@pytest.mark.parametrize("behind", [False, True])
def test_no_metadata_of_a_png_refuses_its_pixels(metadata: bytes, behind: bool):
    expected = pixels(9, 7)
    data = saved(Image.fromarray(expected), "PNG")
    place = len(data) - 12 if behind else 33
    data = data[:place] + metadata + data[place:]
    for exif in (False, True):
        np.testing.assert_array_equal(decode(data, "a.png", exif=exif), expected)
    assert orientation_of(data) == 1
    assert all(fault.note for fault in inspect_image(data, "a.png", pixels=100))


def test_exif_that_older_programs_wrote_as_text_is_followed():
    text = PngImagePlugin.PngInfo()
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(4)
    text.add_text("Raw profile type exif", f"\nexif\n{len(block):8}\n{block.hex()}\n", zip=True)
    assert orientation_of(saved(Image.fromarray(pixels(9, 7)), "PNG", pnginfo=text)) == 6


def test_an_orientation_may_be_written_as_a_fraction():
    data = jpeg()
    entry = b"\x01\x12\0\5\0\0\0\1\0\0\0\x1a" + bytes(4) + struct.pack(">II", 6, 1)
    block = b"Exif\0\0MM\0*\0\0\0\x08\0\1" + entry
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    smaller = shrunk(data, "x", 20)
    assert smaller is not None
    assert orientation_of(data) == orientation_of(smaller) == 6

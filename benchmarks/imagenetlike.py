"""JPEG files like ImageNet's, made anew by everyone: their sizes, qualities and bytes, without a photograph.

A picture is noise whose amplitude falls with 1/f, as that of photographs does, and some shapes with hard edges. Sizes,
qualities and the chroma sampling are drawn from a mix whose files have 107 KB on average, as ImageNet's training images
have (`python benchmarks/imagenetlike.py` prints what 600 of them have).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import simplejpeg

__all__ = ["folder", "photo", "picture"]

SIZES = [  # (width, height), share
    ((500, 375), 0.38),
    ((375, 500), 0.10),
    ((500, 333), 0.18),
    ((333, 500), 0.06),
    ((500, 400), 0.06),
    ((500, 500), 0.05),
    ((400, 300), 0.05),
    ((250, 200), 0.04),
    ((640, 480), 0.05),
    ((1024, 768), 0.02),
    ((1600, 1200), 0.01),
]
QUALITIES = [(75, 0.15), (85, 0.15), (92, 0.35), (96, 0.35)]
SAMPLINGS = [("420", 0.6), ("444", 0.33), ("422", 0.05), ("Gray", 0.02)]


def picture(width: int, height: int, random: np.random.Generator) -> np.ndarray:
    """uint8 (height, width, 3) of 1/f noise and shapes."""
    fx, fy = np.fft.rfftfreq(width)[None, :], np.fft.fftfreq(height)[:, None]
    amplitude = 1 / np.maximum(np.hypot(fx, fy), 1 / max(width, height)) ** random.uniform(1.17, 1.47)
    planes = []
    for _ in range(3):
        phases = np.exp(2j * np.pi * random.random(amplitude.shape))
        plane = np.fft.irfft2(amplitude * phases, (height, width))
        planes.append(plane / plane.std())
    grey, *colours = planes
    image = np.stack([grey + 0.35 * colour for colour in (*colours, -colours[0] - colours[1])], 2)
    image = 118 + 52 * image
    rows, columns = np.mgrid[:height, :width]
    for _ in range(random.integers(2, 7)):
        centre, radius = random.random(2) * (height, width), random.uniform(0.05, 0.3, 2) * min(height, width)
        distance = ((np.stack([rows, columns]) - centre[:, None, None]) / radius[:, None, None]) ** 2
        inside = distance.sum(0) < 1 if random.random() < 0.5 else distance.max(0) < 1
        image[inside] = 0.6 * image[inside] + 0.4 * random.uniform(0, 255, 3)
    return image.clip(0, 255).astype(np.uint8)


def photo(seed: int) -> bytes:
    """The JPEG file of a seed."""
    random = np.random.default_rng(seed)
    width, height = _drawn(SIZES, random)
    image, sampling = picture(width, height, random), _drawn(SAMPLINGS, random)
    quality = _drawn(QUALITIES, random)
    if sampling == "Gray":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(image[:, :, :1]), quality, "GRAY", "Gray")
    return simplejpeg.encode_jpeg(image, quality, "RGB", sampling)


def folder(root: Path, *, classes: int, train: int, val: int, distinct: int | None = None) -> Path:
    """ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.JPEG, as `onehour train --data` takes them.

    Args:
        train, val: files of each class.
        distinct: pictures that all of them are copies of; None makes each anew.
    """
    made: dict[int, bytes] = {}
    number = 0
    for side, count in (("train", train), ("val", val)):
        for label in range(classes):
            place = root / side / f"n{label:08d}"
            place.mkdir(parents=True, exist_ok=True)
            for file in range(count):
                seed = number % distinct if distinct else number
                data = made.get(seed) or photo(seed)
                if distinct:
                    made[seed] = data
                (place / f"n{label:08d}_{file}.JPEG").write_bytes(data)
                number += 1
    return root


def _drawn(shares: list, random: np.random.Generator):  # type: ignore[no-untyped-def]
    weights = np.array([share for _, share in shares])
    return shares[random.choice(len(shares), p=weights / weights.sum())][0]


def main() -> None:
    """Print what 600 of them have."""
    files = [photo(seed) for seed in range(int(sys.argv[1]) if len(sys.argv) > 1 else 600)]
    sizes = np.array([len(data) for data in files])
    pixels = np.array([simplejpeg.decode_jpeg_header(data)[:2] for data in files]).prod(1)
    print(f"{len(files)} files: {sizes.mean() / 1e3:.1f} KB on average, median {np.median(sizes) / 1e3:.1f}")
    print(f"{pixels.mean():,.0f} pixels on average, {8 * sizes.sum() / pixels.sum():.2f} bits a pixel")


if __name__ == "__main__":
    main()

"""Small data and code for `observed.py`, always the same, in the current folder."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

CODE = '''"""A small network, and a logger that asks the run to stop after its first epoch."""

import os
import signal

from torch import nn


def rgb():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 10),
    )


class Stops:
    def start(self, recipe, folder):
        pass

    def log(self, record):
        os.kill(os.getpid(), signal.SIGTERM)

    def finish(self, summary):
        pass
'''


def folder(root: Path, damaged: int) -> None:
    """Two classes of 550 and 8 small JPEGs, of which some of the first side cannot be read."""
    random = np.random.default_rng(0)
    for side, count in (("train", 550), ("val", 8)):
        for number, name in enumerate(("cat", "dog")):
            place = root / side / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 160, (24, 32, 3)) + 60 * number
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:03}.jpg", quality=90)
    for i in range(damaged):
        (root / "train" / "cat" / f"{3 * i:03}.jpg").write_bytes(b"no image")


def cifar(path: Path) -> None:
    """An archive in CIFAR-10's form, of 16 images a batch."""
    random = np.random.default_rng(1)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    with tarfile.open(path, "w:gz") as file:
        for name in names:
            labels = random.integers(0, 10, 16).tolist()
            pixels = random.integers(0, 256, (16, 3072), dtype=np.uint8)
            batch = {b"batch_label": b"x", b"labels": labels, b"data": pixels, b"filenames": [b"a.png"] * 16}
            body = pickle.dumps(batch, protocol=2)
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(body)
            file.addfile(entry, io.BytesIO(body))


if __name__ == "__main__":
    Path("tinynet.py").write_text(CODE)
    folder(Path("images"), damaged=0)
    folder(Path("damaged"), damaged=1)
    cifar(Path("cifar-10.tar.gz"))

"""Images in MNIST's format, IDX: Fashion-MNIST by name, and MNIST, KMNIST, EMNIST and the like by their folder."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from onehour.data.dataset import FaultError

INSTALLED = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package puts Fashion-MNIST."""
PUBLISHED = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of each of its files, unpacked."""
EXPECTED_FASHION = (
    "expected Fashion-MNIST's four files, as `apt install dataset-fashion-mnist` installs them or"
    " https://github.com/zalandoresearch/fashion-mnist has them"
)
EXPECTED = (
    "expected four files named as MNIST's, gzipped or not: train-images-idx3-ubyte, train-labels-idx1-ubyte, and the"
    " same with t10k or test in place of train"
)
TRAINING_IMAGES = re.compile(r"train-images[-.]idx3-ubyte(\.gz)?$")
BYTES = 0x08
"""The type of IDX's elements that images and labels have."""
LARGEST = 2**30
"""Bytes of a file that are read at most; EMNIST's largest has 547 million."""


def fashion_mnist(folder: str = INSTALLED) -> tuple[TensorDataset, TensorDataset]:
    """Fashion-MNIST of a folder: 60,000 training and 10,000 validation photographs of clothes, 28×28, of 10 classes."""
    return _load(Path(folder, "train-images-idx3-ubyte"), EXPECTED_FASHION, PUBLISHED)


def idx(path: str) -> tuple[TensorDataset, TensorDataset]:
    """Training and validation images of four IDX files, in memory: float32 (N, 1, H, W), and labels (N,).

    Both are standardised by the mean and the deviation of the training pixels.

    Args:
        path: the file of training images, or the folder that has one; the others lie beside it.
    """
    found = sorted(idx_files(path))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise ValueError(f"{path} has training images of several data sets; give the path of one of {names}")
    return _load(found[0], EXPECTED, {})


def idx_files(path: str) -> set[Path]:
    """The training images that a path means, or that lie in it as a folder, without .gz; none of anything else."""
    files = Path(path).glob("*train-images*") if os.path.isdir(path) else [Path(path)]
    return {file.with_name(file.name.removesuffix(".gz")) for file in files if TRAINING_IMAGES.search(file.name)}


def _load(first: Path, expected: str, digests: dict[str, str]) -> tuple[TensorDataset, TensorDataset]:
    before, _, after = first.name.rpartition("train-images")
    has_test = any(_forms(first.with_name(f"{before}test-images{after}")))
    train, validation = (
        _side(first, f"{before}{side}", after, expected, digests) for side in ("train", "test" if has_test else "t10k")
    )
    if not train[0].numel() or train[0].min() == train[0].max():
        raise FaultError(str(first), "has only identical pixels", expected)
    std, mean = torch.std_mean(train[0])
    return TensorDataset((train[0] - mean) / std, train[1]), TensorDataset((validation[0] - mean) / std, validation[1])


def _side(first: Path, side: str, after: str, expected: str, digests: dict[str, str]) -> tuple[Tensor, Tensor]:
    files = first.with_name(f"{side}-images{after}"), first.with_name(f"{side}-labels{after.replace('idx3', 'idx1')}")
    arrays = (_array(file, n, expected, digests.get(file.name)) for file, n in zip(files, (3, 1), strict=True))
    images, labels = map(torch.from_numpy, arrays)
    if len(images) != len(labels):
        raise FaultError(str(files[0]), f"has {len(images)} images, and there are {len(labels)} labels", expected)
    return images[:, None].float(), labels.long()


def _forms(name: Path) -> list[Path]:
    return [file for file in (name, name.with_name(f"{name.name}.gz")) if file.is_file()]


def _array(name: Path, dimensions: int, expected: str, digest: str | None) -> np.ndarray:
    """The bytes of an IDX file: 0, 0, the elements' type, the number of dimensions, each as 4 bytes, the elements."""
    file = next(iter(_forms(name)), None)
    if file is None:
        raise FaultError(str(name), "is not there, and not as .gz either", expected)
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            content = stream.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FaultError(str(file), f"cannot be read: {error}", expected) from error
    start = 4 + 4 * dimensions
    if content[:4] != bytes((0, 0, BYTES, dimensions)) or len(content) < start:
        raise FaultError(str(file), f"is not an IDX file of bytes in {dimensions} dimensions", expected)
    shape = np.frombuffer(content[4:start], ">u4").tolist()
    size = start + math.prod(shape)
    if len(content) != size:
        found = f"{len(content):,}" if len(content) <= LARGEST else f"more than {LARGEST:,}"
        raise FaultError(str(file), f"should have {size:,} bytes by its header, and has {found}", expected)
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        problem = "is damaged, or of another data set: its SHA-256 is not the published one"
        raise FaultError(str(file), problem, expected)
    return np.frombuffer(bytearray(content), np.uint8, offset=start).reshape(shape)

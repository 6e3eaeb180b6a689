"""A run's weights in the files that others read: a state dict under torch's own names, or the network as a program.

Each file is opened again, and compared with what was to be written, before it gets its name.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onehour.config import Recipe
from onehour.data.loader import prepared
from onehour.data.samples import Keyed
from onehour.data.sources import Data, complete
from onehour.files import written
from onehour.messages import blame
from onehour.models.load import load_model
from onehour.training.store import as_safetensors
from onehour.training.weights import fit, load_file, read_weights

WEIGHTS, PROGRAMS = (".safetensors", ".pt", ".pth"), (".pt2", ".onnx")
TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest one where that is above 1, that counts as the same network."""
IMAGES = 8
"""Of the validation data, with which a program is made and compared."""
ONNX = ("onnx", "onnxscript", "onnxruntime")


def refuse_place(to: Path, suffixes: Iterable[str], *, force: bool) -> None:
    """Refuse a file's name before anything is computed."""
    if to.suffix not in suffixes:
        *others, last = suffixes
        raise ValueError(f"{to} must end in {', '.join(others)} or {last}")
    if to.exists() and not force:
        raise ValueError(f"{to} exists; remove it first, choose another name, or give --force to replace it")


def export_weights(source: Path, to: Path, *, force: bool = False, ema: bool = False) -> Path:
    """Write the weights of a run, or of a file, as a plain state dict, whole or not at all.

    Args:
        to: ends in .safetensors, .pt or .pth; loads in torchvision's and timm's model of the same name.
    """
    refuse_place(to, WEIGHTS, force=force)
    return write_weights(read_weights(source, ema=ema), to)


def write_weights(weights: dict[str, Tensor], to: Path) -> Path:
    """Write a state dict to a file whose name is free, or to be replaced; as `export_weights`."""
    # A tensor of its own for each name: tied weights share one, and a view would bring all that it is a view of.
    weights = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}

    def check(path: Path) -> None:
        found = load_file(path, to.suffix)
        if not (found.keys() == weights.keys() and all(_same(found[name], weights[name]) for name in weights)):
            raise ValueError(f"{to} was not written: opened again, it holds other numbers; is the disk sound?")

    if to.suffix == ".safetensors":
        return _write(to, list(as_safetensors(weights)), check)
    buffer = BytesIO()
    torch.save(weights, buffer)  # to the file itself, it would call a full disk by another name
    return _write(to, [buffer.getbuffer()], check)


def export_program(
    source: Path, to: Path, *, recipe: Recipe, force: bool = False, ema: bool = False
) -> tuple[tuple[int, ...], float]:
    """Write the network itself, in float32, for batches of any size: images as the network takes them, to logits.

    It is the plain network that the recipe names, with torch's own BatchNorm in evaluation.

    Args:
        to: ends in .pt2 (`torch.export.load`) or .onnx (inputs "images", outputs "logits").
        recipe: names model and data; the shape of images comes from its validation data.

    Returns:
        The shape of an image, and the largest difference between the file's logits and the network's on validation
        images, relative to the largest logit where that is above 1.
    """
    refuse_place(to, PROGRAMS, force=force)
    if to.suffix == ".onnx":
        _need_packages(to)
    if recipe.task is not None:
        raise ValueError(
            f"{to.suffix} holds a classifier of images, and task {recipe.task} may be anything; export its weights to"
            " .safetensors or .pt"
        )
    weights = read_weights(source, ema=ema)
    recipe, loaded = complete(recipe, trains=False)
    model = load_model(recipe.model, channels=loaded.channels, classes=recipe.classes)
    fit(model, weights, source)
    model, images = model.float().eval(), _images(loaded)
    try:
        with _silence(), torch.no_grad():
            content = (_as_onnx if to.suffix == ".onnx" else _as_pt2)(model, images)
    except Exception as error:
        raise ValueError(f"torch cannot export this network for batches of any size: {blame(error)}") from error
    differences: list[float] = []

    def check(path: Path) -> None:
        try:
            with _silence():
                differences.append(_difference(model, _opened(path, to.suffix), images))
        except Exception as error:  # of any class that a runtime likes
            raise ValueError(f"{to} was not written: opened again, it does not run: {blame(error)}") from error
        if not differences[0] <= TOLERANCE:
            raise ValueError(
                f"{to} was not written: opened again, its logits differ from the network's by {differences[0]:.1e},"
                f" more than {TOLERANCE:g}"
            )

    _write(to, [content], check)
    return tuple(images.shape[1:]), differences[0]


def _write(to: Path, parts: list[Any], check: Callable[[Path], None]) -> Path:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with written(to.parent, to.name, check=check) as file:
            for part in parts:
                file.write(part)
    except OSError as error:
        size = sum(map(len, parts))
        raise ValueError(f"{to} cannot be written: {error.strerror or error} ({size:,} bytes are needed)") from error
    return to


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are: NaN equals itself."""
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _need_packages(to: Path) -> None:
    for package in ONNX:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"{to} needs the package {package}: pip install 'onehour[onnx]'") from error


@contextmanager
def _silence() -> Generator[None]:
    """Keep to itself what torch's exporters print, log and warn of beside their errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
            yield
    finally:
        logging.disable(before)


def _images(data: Data) -> Tensor:
    """The first validation images, as the network takes them; at least two, since a batch of one may be special."""
    keys = [(0, index, index) for index in range(min(IMAGES, data.looks[1].samples))]
    (images, _), _ = Keyed(data.validation, 0, side="validation").batch(keys)
    images = prepared(data.validation, images).float().contiguous()
    return images if len(images) > 1 else torch.cat([images, images])


def _as_pt2(model: nn.Module, images: Tensor) -> bytes:
    buffer = BytesIO()
    size = {0: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=(size,)), buffer)
    return buffer.getvalue()


def _as_onnx(model: nn.Module, images: Tensor) -> bytes:
    untyped: Any = torch.onnx
    size, names = {0: torch.export.Dim("batch")}, {"input_names": ["images"], "output_names": ["logits"]}
    program = untyped.export(model, (images,), dynamo=True, dynamic_shapes=(size,), verbose=False, **names)
    return program.model_proto.SerializeToString()


def _opened(path: Path, suffix: str) -> Callable[[Tensor], Tensor]:
    """What a file computes."""
    if suffix == ".pt2":
        with path.open("rb") as file:
            program = torch.export.load(BytesIO(file.read()))
        return program.module()
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.as_tensor(session.run(["logits"], {"images": images.numpy()})[0])


@torch.no_grad()
def _difference(model: nn.Module, other: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Over batches of several sizes, the one that it was made with among them."""
    worst = 0.0
    for batch in (images, images[:1], torch.cat([images, images[1:]])):
        logits = model(batch)
        scale = max(1.0, float(logits.abs().max()))
        worst = max(worst, float((other(batch) - logits).abs().max()) / scale)
    return worst

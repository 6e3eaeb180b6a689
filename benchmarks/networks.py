"""Every family of timm that has BatchNorm: built, converted, compared with k separate passes, trained for an iteration.

    python benchmarks/networks.py

Needs timm and torchvision, as `make test-vision` installs them. A family is one of timm's modules; a small model
of it with BatchNorm stands for it, on images as small as it takes; and those of `ALSO`. Writes results/networks.json,
which names the families without BatchNorm too, so that none is forgotten.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import TensorDataset

import onehour
from onehour.rules.batchnorm import convert_batchnorm
from results import write

PER_WORKER, WORKERS, CLASSES = 2, 2, 3
ALSO = ("mobilenetv4_conv_small", "regnety_002", "repvgg_a0", "resnext26ts", "mobileone_s0")
"""Of large families."""

BOUND = 1e-9
"""How far float64 may be from k separate passes, relative to what they give; what is over other samples is 1e-2 off."""

ROUNDINGS = 100.0
"""Or so many times as far as k passes are from the same passes with their images rounded otherwise. Where two values of
a channel become ±1, whatever they were, gradients are what is left of a cancellation, and every layer rounds."""

FEW = 15_000_000
"""Parameters."""

SIZES = (64, 128, 224, 256)
"""Sides of images, the smallest first that a model takes."""


def tried(name: str, size: int) -> dict[str, Any]:
    """A model of timm as a run takes it.

    Args:
        name: the model's.
        size: its images' side.

    Returns:
        Its BatchNorm layers and their classes; the loss of a first iteration; how far outputs and gradients are from k
        separate passes, and for comparison these from themselves with images a last bit larger, and the outputs of one
        BatchNorm over all kn. Of a model that is refused, why, and its loss with batchnorm keep.
    """
    torch.manual_seed(0)
    own = without_draws(made(name)).double()
    layers = [module for module in own.modules() if isinstance(module, _BatchNorm)]
    found: dict[str, Any] = {"layers": len(layers), "classes": sorted({type(layer).__name__ for layer in layers})}
    try:
        found |= {"batchnorm": "ghost", "loss": first_loss(name, size, "ghost")}
    except ValueError as error:
        return found | {"batchnorm": "keep", "loss": first_loss(name, size, "keep"), "refused": str(error)}
    for parameter in (p for layer in layers for p in layer.parameters(recurse=False)):
        nn.init.uniform_(parameter, 0.5, 1.5)  # as they are later: γ = 0 hides what a block does
    images = torch.randn(WORKERS * PER_WORKER, 3, size, size, dtype=torch.float64)
    ghost = convert_batchnorm(copy.deepcopy(own), PER_WORKER)
    outputs, gradients = outputs_and_gradients(ghost, [images])
    again = copy.deepcopy(own)
    alone, summed = outputs_and_gradients(own, [images[worker::WORKERS] for worker in range(WORKERS)])
    rounded = images.nextafter(2 * images)
    rounded_alone, rounded_summed = outputs_and_gradients(
        again, [rounded[worker::WORKERS] for worker in range(WORKERS)]
    )
    with torch.no_grad():
        pooled = own(images)
    of_workers = alone.view(WORKERS, PER_WORKER, -1).transpose(0, 1).flatten(0, 1)
    return found | {
        "outputs_apart": distance(outputs, of_workers),
        "gradients_apart": distance(gradients, summed),
        "outputs_rounded": distance(rounded_alone, alone),
        "gradients_rounded": distance(rounded_summed, summed),
        "pooled_apart": distance(pooled, of_workers),
    }


def made(name: str) -> nn.Module:
    """A model of timm with as many classes as there are here."""
    return import_module("timm").create_model(name, pretrained=False, num_classes=CLASSES)


def without_draws(model: nn.Module) -> nn.Module:
    """The model in training, but for what draws random numbers, which are keyed by the pass."""
    for module in model.train().modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) or hasattr(module, "drop_prob"):
            module.eval()
        if "drop_rate" in vars(module):
            vars(module)["drop_rate"] = 0.0
    return model


def outputs_and_gradients(model: nn.Module, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The logits, and Σ of all gradients as one vector."""
    outputs = [model(batch) for batch in batches]
    sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat(outputs).detach(), torch.cat(gradients)


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def within(found: dict[str, Any], what: str) -> bool:
    """Whether outputs, or gradients, are those of k separate passes, but for rounding; so is what was not measured."""
    return found.get(f"{what}_apart", 0.0) < max(BOUND, ROUNDINGS * found.get(f"{what}_rounded", 0.0))


def first_loss(name: str, size: int, batchnorm: Literal["ghost", "keep"]) -> float:
    """The mean loss of the one iteration of a run, with its evaluation and its checkpoint."""
    draw = torch.Generator().manual_seed(0)
    count = WORKERS * PER_WORKER
    side = TensorDataset(torch.randn(count, 3, size, size, generator=draw), torch.arange(count) % CLASSES)
    recipe = onehour.Recipe(
        model=f"timm:{name}", classes=CLASSES, minibatch=count, per_worker=PER_WORKER, base_minibatch=count,
        base_lr=1e-3, epochs=1, milestones=(), warmup="none", batchnorm=batchnorm,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        run = onehour.train(recipe, data=(side, side), out=folder, device="cpu")
        return float(run.metrics[-1]["train_loss"])


def families() -> list[str]:
    """timm's modules, where they have models."""
    timm = import_module("timm")
    return [module for module in sorted(timm.list_modules()) if timm.list_models(module=module)]


def small(family: str) -> str | None:
    """The first of a family's models that has BatchNorm and few parameters, else the smallest that has BatchNorm."""
    sizes: dict[str, int] = {}
    for name in import_module("timm").list_models(module=family):
        with torch.device("meta"):
            model = made(name)
        if any(isinstance(module, _BatchNorm) for module in model.modules()):
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
            if sizes[name] < FEW:
                return name
    return min(sizes, key=lambda name: sizes[name]) if sizes else None


def smallest_images(name: str) -> int:
    """The side of the smallest images that a model takes."""
    model: Any = made(name)
    for size in (*SIZES, model.default_cfg["input_size"][-1]):
        try:
            with torch.no_grad():
                model.train()(torch.randn(PER_WORKER, 3, size, size))
                model.eval()(torch.randn(1, 3, size, size))
        except Exception:
            continue
        return size
    raise ValueError(f"{name} takes no images of {SIZES} pixels")


def main() -> int:
    """Try every family; 1 if one fails."""
    rows, without = [], []
    chosen: list[tuple[str, str | None]] = [(family, small(family)) for family in families()]
    for family, name in [*chosen, *(("", name) for name in ALSO)]:
        if name is None:
            without.append(family)
            continue
        row: dict[str, Any] = {"family": family, "model": name, "size": smallest_images(name)}
        try:
            row |= tried(name, row["size"])
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"
        row["ok"] = all(within(row, what) for what in ("outputs", "gradients")) and "failed" not in row
        rows.append(row)
        print(*row.values(), flush=True)
    versions = {library: import_module(library).__version__ for library in ("timm", "torchvision")}
    write(__file__, "networks", {**versions, "n": PER_WORKER, "k": WORKERS, "rows": rows, "without": without})
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())

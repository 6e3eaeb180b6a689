"""Network, rate, decay, epochs and flips of the `fashion` recipe, chosen on 10,000 of the 60,000 training images.

    python benchmarks/fashion_choice.py [--only CANDIDATE …] [--seeds 1] [--jobs 1]

The 10,000 test images are not looked at. Resumable: a finished run under runs/fashion-choice is not trained again.
Writes results/fashion_choice.json with every candidate that has a run.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import onehour
from onehour.data.augment import drawn_key, uniform
from onehour.data.dataset import KeyedDataset
from onehour.data.idx import fashion_mnist
from onehour.models.load import MODELS
from onehour.models.resnet import SmallResNet
from onehour.rules.keys import random_bits, seed_for
from onehour.training.record import Run
from results import claim, mean_std, write

RUNS = Path("runs") / "fashion-choice"
HELD_OUT = 10_000
FIRST_SEED = 5000
FIRST: dict[str, Any] = {
    "widths": (16, 64, 128),
    "base_lr": 0.1,
    "weight_decay": 5e-4,
    "epochs": 12,
    "flipped": True,
    "precision": "bf16",
    "channels_last": True,
}
"""All have a stem of stride 2, and their rate at 64; in bf16 and NHWC, as the figure: half the time on a recent CPU."""
CANDIDATES: dict[str, dict[str, Any]] = {
    "16-64-128": FIRST,
    "not flipped": FIRST | {"flipped": False},
    "32-64-128, 8 epochs": FIRST | {"widths": (32, 64, 128), "epochs": 8},
    "λ 1e-4": FIRST | {"weight_decay": 1e-4},
    "rate 0.05": FIRST | {"base_lr": 0.05},
    "16-32-64": FIRST | {"widths": (16, 32, 64)},
}
"""The first, and one thing changed in it; so large that the figure's 105 runs take about 8 hours on two cores."""


class Flipped(KeyedDataset):
    """Images in memory, of which a key turns half left to right."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.images, self.labels = dataset.tensors
        self.classes = 10

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.keyed(index, drawn_key())

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        """Image `index`, perhaps flipped, and its label."""
        image = self.images[index]
        return image.flip(-1) if uniform(key, 1)[0] < 0.5 else image, int(self.labels[index])


def held_out() -> tuple[TensorDataset, TensorDataset]:
    """50,000 of the training images, and the other 10,000 in place of the test images, divided by a key."""
    images, labels = fashion_mnist()[0].tensors
    order = torch.from_numpy(np.argsort(random_bits(seed_for(0, "fashion choice"), len(images)), kind="stable"))
    first, last = order[:-HELD_OUT], order[-HELD_OUT:]
    return TensorDataset(images[first], labels[first]), TensorDataset(images[last], labels[last])


def flipped() -> tuple[Flipped, TensorDataset]:
    """The same, with the training images flipped half of the time."""
    train, validation = held_out()
    return Flipped(train), validation


def train(cell: tuple[str, int]) -> Run:
    """One run, on one thread."""
    name, seed = cell
    torch.set_num_threads(1)
    changes = dict(CANDIDATES[name])
    model = "resnet8-" + "-".join(map(str, changes.pop("widths")))
    MODELS[model] = partial(SmallResNet, CANDIDATES[name]["widths"], stride=2)
    folder = RUNS / f"{list(CANDIDATES).index(name)}-s{seed}"
    data = "fashion_choice:flipped" if changes.pop("flipped") else "fashion_choice:held_out"
    changes |= {"data": data, "model": model, "minibatch": 64, "seed": seed}
    return onehour.train("fashion", out=folder, device="cpu", loaders=0, **changes)


def row(name: str, runs: list[Run]) -> dict[str, Any]:
    """A candidate with its runs' errors on the images that were held out, and what an epoch costs."""
    errors = [run.final_error for run in runs]
    seconds = [run.summary["seconds_training"] / run.recipe.epochs for run in runs]
    spread = mean_std(errors) if len(errors) > 1 else {"mean": errors[0], "std": None, "n": 1}
    about = {"parameters": runs[0].summary["parameters"], "epoch_seconds": sum(seconds) / len(seconds)}
    return {"candidate": name, **CANDIDATES[name], **spread, "errors": errors, **about}


def main() -> None:
    """Train what is missing; write what there is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    claim(RUNS, __file__)
    cells = [(name, FIRST_SEED + seed) for seed in range(options.seeds) for name in options.only]
    with ProcessPoolExecutor(options.jobs) as pool:
        list(pool.map(train, cells))
    rows = []
    for number, name in enumerate(CANDIDATES):
        runs = [Run(folder) for folder in sorted(RUNS.glob(f"{number}-s*"))]
        if done := [run for run in runs if run.finished]:
            rows.append(row(name, done))
    for each in rows:
        print(f"{each['mean']:.2f} % ({each['n']} seeds), {each['epoch_seconds']:.0f} s an epoch: {each['candidate']}")
    split = {"held_out": HELD_OUT, "key": "seed_for(0, 'fashion choice')", "first_seed": FIRST_SEED}
    write(__file__, "fashion_choice", {"split": split, "candidates": rows})


if __name__ == "__main__":
    main()

"""Runs an example of examples/frameworks/ in each process of a world, and writes what it trained and validated."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import TensorDataset

EXAMPLES = Path(__file__).parents[2] / "examples" / "frameworks"
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))

LOADERS: dict[str, dict[str, Any]] = {
    "0 loaders": {},
    "2 loaders": {"num_workers": 2},
    "2 loaders that stay": {"num_workers": 2, "persistent_workers": True},
}
STARTS = {
    # Samples, updates between checkpoints, the update that is lost; and so where the second run goes on.
    "within an epoch": (125, 5, 23),  # 16, 16, 15 iterations
    "between epochs": (125, 16, 34),
    "within an epoch after a short one": (84, 4, 26),  # 11, 10, 11 iterations
    "between epochs after a short one": (84, 21, 23),
}


class LostError(Exception):
    """The process is lost here, as far as the run can tell."""


class Taped(nn.Module):
    """Writes down the samples of each pass; a sample's one feature is its index."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Any] = []
        self.linear = nn.Linear(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.tape.append(["samples", [int(index) for index in x[:, 0]]])
        elif self.tape[-1:] != ["validation"]:
            self.tape.append("validation")
        return self.linear(x / 1000)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, folder: Path, samples: int, save_every: int, lost: int | None, loaders: dict[str, Any]) -> list[Any]:
    """What a run did, up to the update that is lost."""
    torch.manual_seed(0)
    net, devices = Taped(), {"devices": WORLD}
    data = TensorDataset(torch.arange(samples).float()[:, None], torch.arange(samples) % 2)

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        net.tape.append(["rate", optimizer.param_groups[0]["lr"]])
        if sum(entry[0] == "rate" for entry in net.tape) == lost:
            raise LostError

    hook = register_optimizer_step_post_hook(note)
    try:
        example(name).train(
            net, data, data, folder, save_every, **loaders, **(devices if name == "with_lightning" else {})
        )
    except LostError:
        pass
    finally:
        hook.remove()
    return net.tape


def main(name: str, folder: Path) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # `accelerate launch --cpu` sets it
    if name == "own_loop" and WORLD > 1:
        dist.init_process_group("gloo")
    tapes = {}
    for number, (loaders, start) in enumerate((loaders, start) for loaders in LOADERS for start in STARTS):
        samples, save_every, lost = STARTS[start]
        kept = folder / str(number)
        if name == "own_loop":
            kept.mkdir(exist_ok=True)
        runs = [run(name, kept, samples, save_every, at, LOADERS[loaders]) for at in (lost, None)]
        tapes[f"{loaders}, {start}"] = runs
    (folder / f"tapes-{RANK}.json").write_text(json.dumps(tapes))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(sys.argv[1], Path(sys.argv[2]))

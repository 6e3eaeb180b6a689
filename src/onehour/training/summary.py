"""How a run ended: its error, its speed, what it waited for, and digests of its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.training.record import MEDIAN_OF, Run
from onehour.training.state import digest_of, model_state, optimizer_state
from onehour.training.timing import PARTS

__all__ = ["summarise"]

NAMES = {
    "data": "waiting for data",
    "compute": "forward and backward",
    "reduction": "waiting for the reduction",
    "update": "the update",
}


def summarise(folder: Path, recipe: Recipe, model: nn.Module, optimizer: Optimizer, outcome: str) -> dict[str, Any]:
    """summary.json from the run's records and its final state.

    Args:
        outcome: "finished" or "non-finite".
    """
    run = Run(folder)
    metrics, timing = run.metrics, run.timing
    errors = [record["top1_error"] for record in metrics]
    seconds = sum(line["seconds"] for line in timing)
    steps = np.array([step for line in timing for step in line["steps_ms"]]).reshape(-1, len(PARTS))
    mean_ms = dict(zip(PARTS, steps.mean(0).tolist() if len(steps) else [0.0] * len(PARTS), strict=True))
    weights, velocity = model_state(model, copy=False), optimizer_state(optimizer, model, copy=False)
    return {
        "outcome": outcome,
        "recipe": recipe.name,
        "minibatch": recipe.minibatch,
        "seed": recipe.seed,
        "final_error": run.final_error if outcome == "finished" else None,
        "last_errors": errors[-MEDIAN_OF:],
        "epochs": metrics[-1]["epoch"] if metrics else 0,
        "iterations": metrics[-1]["iteration"] if metrics else 0,
        "images_per_second": sum(line["images"] for line in timing) / seconds if seconds else None,
        "seconds_training": seconds,
        "seconds_evaluating": sum(line["evaluate_seconds"] for line in timing),
        "step_ms": mean_ms,
        "bottleneck": NAMES[max(mean_ms, key=mean_ms.__getitem__)],
        "weights_sha256": digest_of(weights),
        "state_sha256": digest_of(weights, velocity),
        **_sizes(model, velocity),
    }


def _sizes(model: nn.Module, velocity: dict[str, Tensor]) -> dict[str, Any]:
    def described(tensors: Any) -> dict[str, Any]:
        return {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "bytes": t.nbytes}
            for name, t in tensors
        }

    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter_bytes": sum(p.nbytes for p in model.parameters()),
        "buffer_bytes": sum(b.nbytes for b in model.buffers()),
        "optimizer_bytes": sum(t.nbytes for t in velocity.values()),
        "parameter_tensors": described(model.named_parameters()),
        "buffer_tensors": described(model.named_buffers()),
    }

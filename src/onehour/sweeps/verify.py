"""The proof that p does not matter: a few iterations on several numbers of processes, compared."""

from __future__ import annotations

import hashlib
import json
import statistics
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from onehour.config import Recipe
from onehour.data.sources import complete
from onehour.dist.devices import deterministic
from onehour.dist.group import Group
from onehour.execution import Execution
from onehour.training.build import build_model
from onehour.training.decisions import decisions_of
from onehour.training.feeds import open_feeds, pick_workers_per_pass, refuse_samples
from onehour.training.loop import iterate
from onehour.training.state import Network, digest_of, host_copies
from onehour.training.step import Step
from onehour.training.task import task_of
from onehour.training.weights import start_from

MODES = (("fast", "float64"), ("fast", "float32"), ("canonical", "float32"))
TOLERANCE = 1e-9
"""Largest relative difference in float64 that counts as the order of adding alone."""
History = dict[str, tuple[str, float]]
"""Of each tensor after an iteration: a digest for equal bits, and a norm for nearly equal values."""


def trace(recipe: Recipe, *, steps: int, group: Group, folder: Path) -> None:
    """Run the first `steps` iterations in every mode; process 0 writes what it held after each.

    Files: p{P}-{mode}-{precision}.json with a digest and a fingerprint of every tensor at every iteration, and the
    last state as .safetensors.
    """
    for mode, precision in MODES:
        chosen = recipe.replace(reduce=mode, precision=precision)
        with deterministic(chosen):
            history, seconds, state = _iterate(chosen, steps, group)
        if group.rank == 0:
            name = f"p{group.size}-{mode}-{precision}"
            (folder / f"{name}.safetensors").write_bytes(save(state))
            content = {"iterations": history, "seconds_a_step": seconds, "sha256": digest_of(state)}
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _iterate(recipe: Recipe, steps: int, group: Group) -> tuple[list[History], float, dict[str, Tensor]]:
    recipe, data = complete(recipe)
    execution = Execution(processes=group.size)
    task = task_of(recipe, None, group.device)
    model, decisions = build_model(recipe, data, group.device, task=task), decisions_of(recipe)
    if recipe.init:
        start_from(recipe, data, model, group.device)
    network = Network(model, decisions.optimizer(model))
    together = pick_workers_per_pass(execution, recipe, data, model, group.device.type)
    feeds = open_feeds(recipe, data, execution, model, decisions.stream(), group)
    history, state = list[History](), dict[str, Tensor]()
    with closing(feeds), Step(decisions, network, per_pass=together, group=group, task=task) as step:
        model.train()
        for _ in iterate(step, feeds.training, range(steps)):
            weights, velocity = map(host_copies, network.state())
            state = weights | {f"velocity/{name}": tensor for name, tensor in velocity.items()}
            if group.rank == 0:
                history.append({name: _fingerprint(tensor) for name, tensor in state.items()})
        if not step.alive.all():
            refuse_samples(range(steps), feeds.training, step.passes, group)
            raise ValueError(
                f"the loss or a gradient was not finite within {steps} iterations, so there is nothing to compare; use"
                " a lower base_lr or fewer steps"
            )
    return history, statistics.median(sum(parts.values()) / 1e3 for parts in step.timer.steps()), state


def _fingerprint(tensor: Tensor) -> tuple[str, float]:
    digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()[:16]
    return digest, float(tensor.double().square().sum().sqrt())


@dataclass(frozen=True)
class Comparison:
    """What one mode showed over the numbers of processes.

    Args:
        holds: whether its claim does; None where there is no claim (float32 adds in another order).
        difference: largest relative difference of any weight, statistic or velocity at the end; 0 for equal bits.
        sha256: of the state, for each number of processes.
        first: the first tensor and iteration that differ, where the claim fails.
        seconds: a step, for each number of processes.
    """

    mode: str
    precision: str
    holds: bool | None
    difference: float
    sha256: dict[int, str]
    first: str | None
    seconds: dict[int, float]


def compare(folder: Path, processes: list[int]) -> list[Comparison]:
    """Compare what `trace` wrote; the first number of processes is what the others are held against."""
    return [_compare(folder, processes, mode, precision) for mode, precision in MODES]


def _compare(folder: Path, processes: list[int], mode: str, precision: str) -> Comparison:
    names = {p: f"p{p}-{mode}-{precision}" for p in processes}
    traces = {p: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for p, name in names.items()}
    base = processes[0]
    state = load((folder / f"{names[base]}.safetensors").read_bytes())
    difference = 0.0
    for p in processes[1:]:
        other = load((folder / f"{names[p]}.safetensors").read_bytes())
        difference = max(difference, *(_difference(state[name], other[name]) for name in state))
    sha256 = {p: trace["sha256"] for p, trace in traces.items()}
    holds = None
    if mode == "canonical":
        holds = len(set(sha256.values())) == 1
    elif precision == "float64":
        holds = difference <= TOLERANCE
    return Comparison(
        mode=mode,
        precision=precision,
        holds=holds,
        difference=difference,
        sha256=sha256,
        first=_first(traces, base, exact=mode == "canonical") if holds is False else None,
        seconds={p: trace["seconds_a_step"] for p, trace in traces.items()},
    )


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(((a - b).abs() / a.abs().clamp(min=1)).max()) if a.numel() else 0.0


def _first(traces: dict[int, Any], base: int, *, exact: bool) -> str | None:
    for iteration, known in enumerate(traces[base]["iterations"]):
        for p, other in traces.items():
            for name, (digest, norm) in other["iterations"][iteration].items():
                same = digest == known[name][0] if exact else abs(norm - known[name][1]) <= TOLERANCE * max(1.0, norm)
                if not same:
                    return f"{name} at iteration {iteration}, {p} processes against {base}"
    return None

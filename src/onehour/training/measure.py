"""What is measured of a run: where an iteration's time goes, a trace, the lines of its record, its summary."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from onehour.config import Recipe
from onehour.files import replace_whole
from onehour.lock import OpenFolder
from onehour.noise import FEWEST, noise_scale
from onehour.training.decisions import AdaScaled, Decisions
from onehour.training.engine import ModelAndOptimizer
from onehour.training.record import MEDIAN_OF, PARTS, Run, final_error
from onehour.training.state import digest_of, model_state, optimizer_state
from onehour.training.task import CLASSIFICATION, Evaluation, Task

NOT_FINITE = (
    "the model's outputs are NaN or infinite for validation samples that are finite: val_loss is null, and where they"
    " are NaN the sample counts as an error"
)
"""What is said where a record has no validation loss."""
BOTTLENECKS = {
    "data": "waiting for data",
    "compute": "forward and backward",
    "reduction": "waiting for the reduction",
    "update": "the update",
}


class StepTimer:
    """Laps of iterations, without waiting for the device: by the clock on the CPU, by events of the stream on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._laps: list[tuple[str, Any]] = []
        self._closed: list[list[tuple[str, Any]]] = []
        self._silent = False

    def begin(self) -> None:
        """Begin an iteration."""
        self._laps = [("", self._now())]

    def lap(self, part: str) -> None:
        """What happened since the last lap, or the beginning, was `part`; an iteration may have several of each."""
        if not self._silent:
            self._laps.append((part, self._now()))

    @contextmanager
    def silent(self) -> Generator[None]:
        """While entered, laps are left out: an event of a stream that is captured would become part of the graph."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def end(self) -> None:
        self._closed.append(self._laps)

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of each part for every iteration since the last call."""
        if self._on_device:
            torch.cuda.synchronize()
        closed, self._closed = self._closed, []
        return [self._by_part(laps) for laps in closed]

    def _by_part(self, laps: list[tuple[str, Any]]) -> dict[str, float]:
        parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in pairwise(laps):
            parts[part] += before.elapsed_time(after) if self._on_device else (after - before) * 1e3
        return parts

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Clock:
    """The time that belongs to the iterations since the last evaluation: what saving takes is not theirs."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, done: int) -> None:
        """Time from here on belongs to the iterations after `done`."""
        self.since, self._started, self._cpu_started = done, time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Seconds, and seconds of the processors."""
        return time.perf_counter() - self._started, time.process_time() - self._cpu_started

    @contextmanager
    def paused(self) -> Generator[None]:
        """While entered, no time passes."""
        before = self.read()
        yield
        after = self.read()
        self._started += after[0] - before[0]
        self._cpu_started += after[1] - before[1]


@contextmanager
def profiled(
    iterations: int, folder: Path, rank: int, *, warn: Callable[[str], None] = print
) -> Generator[Callable[[], None]]:
    """Trace the third iteration and those after it into trace-RANK.json, for chrome://tracing and Perfetto.

    Gives a function to call after each iteration; 0 iterations trace nothing.
    """
    if not iterations:
        yield lambda: None
        return
    name = f"trace-{rank}.json"

    def write(profiler: torch.profiler.profile) -> None:
        try:
            # torch writes wherever a path leads, a link in the folder for one.
            with tempfile.TemporaryDirectory() as temporary:
                profiler.export_chrome_trace(str(Path(temporary) / name))
                replace_whole(held.descriptor, name, (Path(temporary) / name).read_bytes())
        except (OSError, ValueError) as error:
            warn(f"{name} could not be written: {error}")

    traced: Any = torch.profiler  # which has no types
    schedule = traced.schedule(wait=1, warmup=1, active=iterations, repeat=1)
    with OpenFolder(folder) as held, traced.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step


@dataclass(frozen=True)
class Metrics:
    """What an evaluation adds to metrics.jsonl."""

    epoch: float
    """Whole but for the last of a run that ends within one."""
    iteration: int
    position: int
    lr: float
    train_loss: float
    train_error: float
    val_loss: float | None
    error: float
    skipped: int | None = None
    """Images that were replaced so far; only in runs that may."""
    ema_val_loss: float | None = None
    ema_error: float | None = None
    """Of the averaged weights, in runs that keep them."""
    noise: list[list[float]] | None = None
    """(iteration, tr Σ, |G|²) of the points since the evaluation before, where some were measured."""
    train_metrics: dict[str, float] | None = None
    metrics: dict[str, float] | None = None
    """Of a task of one's own: in place of `train_error` and `error`, which are the first of them."""
    base_iterations: float | None = None
    """τ of AdaScale: how many iterations of the base those so far count as."""
    higher_is_better: tuple[str, ...] | None = None
    """Names of metrics where more is better; with the first line of a task of one's own."""

    def as_dict(self) -> dict[str, Any]:
        """The line, as JSON has it: what is not finite is null."""
        losses = ("val_loss",) if self.ema_error is None else ("val_loss", "ema_val_loss")
        keys = {"error": "top1_error", "ema_error": "ema_top1_error"}
        found = ((keys.get(name, name), value) for name, value in asdict(self).items())
        line = {key: value for key, value in found if value is not None or key in losses}
        if self.metrics is None:
            return line
        del line["train_error"], line["top1_error"]
        for name, values in (("train_metrics", self.train_metrics), ("metrics", self.metrics)):
            line[name] = {key: value if math.isfinite(value) else None for key, value in (values or {}).items()}
        return line | {"train_loss": self.train_loss if self.iteration else None}


def measured(
    decisions: Decisions,
    done: int,
    totals: list[float],
    result: Evaluation,
    *,
    task: Task = CLASSIFICATION,
    averaged: Evaluation | None = None,
    skipped: int | None = None,
    noise: list[list[float]] | None = None,
) -> Metrics:
    """What is known after iteration `done`; of the untrained network, after none.

    Args:
        totals: Σ of the iterations' mean losses and of the task's other rows since the evaluation before.
        result: on the validation data; a loss that is not finite is None, which JSON can say.
        averaged: with the averaged weights.
    """
    recipe, samples, ramp = decisions.recipe, decisions.samples, decisions.ramp
    position = ramp.position(done)
    first = ramp.reaching(ramp.position(max(done - 1, 0)) // samples * samples)  # the evaluation before
    iterations, images = done - first, position - ramp.position(first)
    error, metrics = task.trained(totals, iterations, images) if done else (math.nan, {})
    return Metrics(
        epoch=recipe.epochs if done == decisions.iterations else position // samples,
        iteration=done,
        position=position,
        lr=decisions.rate(max(done - 1, 0)),
        train_loss=totals[0] / iterations if done else math.nan,
        train_error=error,
        val_loss=_finite(result.loss),
        error=result.error,
        skipped=skipped,
        noise=noise,
        base_iterations=decisions.gains.steps if isinstance(decisions, AdaScaled) else None,
        ema_val_loss=None if averaged is None else _finite(averaged.loss),
        ema_error=None if averaged is None else averaged.error,
        train_metrics=metrics if task.counts else None,
        metrics=result.metrics if task.counts else None,
        higher_is_better=task.higher_is_better if task.counts and not done else None,
    )


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def timed(
    metrics: Metrics,
    images: int,
    *,
    seconds: float,
    cpu_seconds: float,
    evaluating: float,
    steps: list[dict[str, float]],
    runs: int = 1,
) -> dict[str, Any]:
    """The line beside it in timing.jsonl.

    Args:
        images: trained on since the evaluation before.
        seconds, cpu_seconds, evaluating: since then.
        steps: milliseconds of each part, for every iteration.
        runs: trained as one network in that time; each is given its share.
    """
    return {
        "epoch": metrics.epoch,
        "iteration": metrics.iteration,
        "images": images,
        "seconds": seconds / runs,
        "cpu_seconds": cpu_seconds / runs,
        "images_per_second": images * runs / seconds if images else 0.0,
        "evaluate_seconds": evaluating / runs,
        "parts": list(PARTS),
        "steps_ms": [[round(step[part] / runs, 3) for part in PARTS] for step in steps],
    }


def summarise(folder: Path, recipe: Recipe, part: ModelAndOptimizer, outcome: str) -> dict[str, Any]:
    """summary.json from the run's records and its final state: error, speed, what it waited for, digests."""
    run = Run(folder)
    metrics, timing = run.metrics, run.timing
    errors = [record["top1_error"] for record in metrics]
    seconds = sum(line["seconds"] for line in timing)
    steps = np.array([step for line in timing for step in line["steps_ms"]]).reshape(-1, len(PARTS))
    mean_ms = dict(zip(PARTS, steps.mean(0).tolist() if len(steps) else [0.0] * len(PARTS), strict=True))
    weights, velocity = model_state(part.model, copy=False), optimizer_state(part.optimizer, part.model, copy=False)
    averages = {} if part.average is None else part.average.state()
    averaged = [record["ema_top1_error"] for record in metrics if "ema_top1_error" in record]
    return {
        "outcome": outcome,
        "recipe": recipe.name,
        "minibatch": recipe.minibatch,
        "seed": recipe.seed,
        "final_error": run.final_error if outcome == "finished" else None,
        **({"ema_final_error": final_error(averaged)} if averaged else {}),
        "last_errors": errors[-MEDIAN_OF:],
        "epochs": metrics[-1]["epoch"] if metrics else 0,
        "iterations": metrics[-1]["iteration"] if metrics else 0,
        "images_per_second": sum(line["images"] for line in timing) / seconds if seconds else None,
        "seconds_training": seconds,
        "seconds_evaluating": sum(line["evaluate_seconds"] for line in timing),
        "step_ms": mean_ms,
        "bottleneck": BOTTLENECKS[max(mean_ms, key=mean_ms.__getitem__)],
        "weights_sha256": digest_of(weights),
        "state_sha256": digest_of(weights, velocity | averages),
        **_sizes(part.model, velocity),
        **_noise(run),
    }


def _noise(run: Run) -> dict[str, Any]:
    """The noise scale and its interval, of a run that measured some."""
    points = [(trace, square) for _, trace, square in run.noise]
    if len(points) < FEWEST:
        return {}
    noise = noise_scale(points)
    return {"noise_scale": noise.scale, "noise_scale_low": noise.low, "noise_scale_high": noise.high}


def _sizes(model: nn.Module, velocity: dict[str, Tensor]) -> dict[str, Any]:
    def described(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Any]:
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

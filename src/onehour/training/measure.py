"""What is measured of a run: its time, a trace, its gradient noise, the lines of its record, its summary."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onehour.data.loader import Batch
from onehour.data.samples import mapped
from onehour.dist.devices import build_of
from onehour.files import replace_whole
from onehour.lock import OpenFolder
from onehour.noise import FEWEST, trace_and_square
from onehour.training.checkpoint import Progress
from onehour.training.decisions import Decisions
from onehour.training.feeds import Skipping
from onehour.training.record import PARTS
from onehour.training.step import Iteration, Step
from onehour.training.task import CLASSIFICATION, Evaluation, Task

NOT_FINITE = (
    "the model's outputs are NaN or infinite for validation samples that are finite: val_loss is null, and where they"
    " are NaN the sample counts as an error"
)
"""What is said where a record has no validation loss."""
MINIBATCHES = 8
"""Whose gradients are compared at a point: so many pairs tell |G|² where two workers of one minibatch do not."""
SHARE = 60
"""Of so many iterations' gradients, one is computed for this alone."""


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


def peak_epochs(decisions: Decisions) -> range:
    """The epochs, counted from 0, whose rate stays above half of the recipe's target, but for warmup and the first.

    Where the rate falls |G|² falls within noise, and B is another one; in the first epoch |G|² is that of a beginning.
    """
    recipe = decisions.recipe
    first = max(1, math.ceil(recipe.warmup_epochs)) if recipe.warms_up else 1
    last = first
    while last < recipe.epochs and recipe.schedule(last + 1 - 1e-9) > recipe.target_lr / 2:
        last += 1
    return range(first, last)


class GradientNoise:
    """Measures tr Σ and |G|² at points that are spread over the epochs of the peak rate.

    At a point the gradients of the next `MINIBATCHES` minibatches are all computed at the present weights; then the run
    goes on with these very minibatches. Weights, statistics and numbers of the run are what they are without it.

    Args:
        slow: entered while a point is measured.
        warn: is told where the points will be too few for an interval.
    """

    def __init__(
        self,
        decisions: Decisions,
        step: Step,
        *,
        slow: Callable[[], AbstractContextManager[None]] = nullcontext,
        warn: Callable[[str], object] | None = None,
    ) -> None:
        self._step, self._minibatch, self._slow = step, decisions.recipe.minibatch, slow
        epochs = peak_epochs(decisions)
        first, stop = (-(-epoch * decisions.samples // self._minibatch) for epoch in (epochs.start, epochs.stop))
        last = min(stop, decisions.iterations) - MINIBATCHES
        points = max(1, decisions.iterations // (SHARE * MINIBATCHES))
        self._due = range(first, last + 1, max(MINIBATCHES, (stop - first) // points))
        if warn is not None and len(self._due) < FEWEST:
            warn(
                f"--noise has iterations for {len(self._due)} of the {FEWEST} points at the peak rate that advise needs"
            )
        self.points: list[list[float]] = []
        """(iteration, tr Σ, |G|²) of those since the last evaluation; what is not finite is left out."""

    def is_due(self, iteration: int) -> bool:
        """Whether a point is measured before iteration t."""
        return iteration in self._due

    def measure(self, iteration: int, batches: Iterator[Batch]) -> list[Batch]:
        """Measure a point before iteration t; gives back the batches that it took.

        Args:
            batches: of the passes from iteration t on.
        """
        taken = list(islice(batches, MINIBATCHES * len(self._step.passes)))
        copies: Iterator[Batch] = (mapped(batch, _cloned) for batch in taken)  # a model may write into its input
        buffers = list(self._step.model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        total: list[Tensor] = []
        squares: list[Tensor] = []
        with self._slow():
            for number in range(iteration, iteration + MINIBATCHES):
                gradient = [g.to(torch.float64, copy=True) for g in self._step.gradient(number, copies)]
                squares.append(_square(gradient))
                total = [a.add_(b) for a, b in zip(total, gradient, strict=True)] if total else gradient
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
        small, big = torch.stack((torch.stack(squares).mean(), _square(total) / MINIBATCHES**2)).cpu().numpy().tolist()
        sizes = {"small_size": self._minibatch, "big_size": MINIBATCHES * self._minibatch}
        point = [iteration, *trace_and_square(small, big, **sizes)]
        if all(map(math.isfinite, point)):
            self.points.append(point)
        return taken

    def take(self) -> list[list[float]] | None:
        """The points, or None where there are none; they are forgotten."""
        points, self.points = self.points, []
        return points or None


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _square(gradient: list[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in gradient]).sum()


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
    samples, ramp = decisions.samples, decisions.ramp
    position = ramp.position(done)
    first = ramp.reaching(ramp.position(max(done - 1, 0)) // samples * samples)  # the evaluation before
    iterations, images = done - first, position - ramp.position(first)
    error, metrics = task.trained(totals, iterations, images) if done else (math.nan, {})
    return Metrics(
        epoch=decisions.evaluated_epoch(done),
        iteration=done,
        position=position,
        lr=decisions.rate(max(done - 1, 0)),
        train_loss=totals[0] / iterations if done else math.nan,
        train_error=error,
        val_loss=_finite(result.loss),
        error=result.error,
        skipped=skipped,
        noise=noise,
        base_iterations=decisions.base_iterations,
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


class Tally:
    """What runs have counted since their last evaluation: time, losses, images skipped, points of the gradient noise.

    Args:
        skipping, noise: None where no image may be skipped, and where the noise is not measured.
    """

    def __init__(
        self, decisions: Decisions, step: Step, skipping: Skipping | None = None, noise: GradientNoise | None = None
    ) -> None:
        self._decisions, self._step, self.skipping, self.noise = decisions, step, skipping, noise
        self.clock = Clock()
        self._totals = torch.zeros(step.task.rows, step.seeds, dtype=torch.float64, device=step.alive.device)
        """Σ of the iterations' mean losses and of the task's other rows, of each seed."""

    def load(self, progress: Sequence[Progress]) -> None:
        """Go on from where each seed stands, all at the same iteration."""
        first = progress[0]
        if first.gains is not None:
            self._decisions.load(first.gains)
        totals = torch.tensor([stands.totals for stands in progress], dtype=torch.float64).T
        if totals.shape != self._totals.shape:
            raise ValueError(
                f"the task counts {self._step.task.rows} sums, and {len(totals)} when the run was saved: its metrics"
                " have changed; put them back, or give --fresh to start over"
            )
        self._totals.copy_(totals)
        if self.skipping is not None:
            self.skipping.skipped.fill_(first.skipped or 0)
        if self.noise is not None:
            self.noise.points = first.noise or []
        self.clock.begin(first.iteration)

    def progress(self, done: int, *, evaluated: bool, together: bool) -> list[Progress]:
        """Where each seed stands after iteration `done`.

        Args:
            evaluated: the record has this iteration's evaluation, if there is one.
            together: all processes ask, at this iteration.
        """
        found: dict[str, Any] = {
            "position": self._decisions.ramp.position(done),
            "build": build_of(self._totals.device),
            "evaluated": evaluated,
            "skipped": None if self.skipping is None else self.skipping.count(together=together),
            "noise": None if self.noise is None else [*self.noise.points] or None,
            "gains": self._decisions.state(),
        }
        return [Progress(done, totals=totals, **found) for totals in self._by_seed()]

    def count(self, done: int, iteration: Iteration) -> Tensor:
        """Add up what an iteration was; above zero where all are to stop."""
        self._totals += torch.where(iteration.alive, iteration.sums, 0.0)
        if self.skipping is None:
            return iteration.stop
        return iteration.stop + self.skipping.add(done - 1, iteration.skipped)

    def spent(self) -> dict[str, Any]:
        """The time since the last evaluation, as `timed` takes it."""
        steps = self._step.timer.steps()  # which waits for the device
        seconds, cpu_seconds = self.clock.read()
        return {"steps": steps, "seconds": seconds, "cpu_seconds": cpu_seconds}

    def take(
        self, done: int, results: Sequence[Evaluation], averaged: Evaluation | None, spent: dict[str, Any]
    ) -> list[tuple[Metrics, dict[str, Any]]]:
        """What an evaluation adds to each seed's record; losses and points are forgotten.

        Args:
            spent: until it began.
        """
        spent = spent | {"evaluating": self.clock.read()[0] - spent["seconds"]}
        position, totals = self._decisions.ramp.position, self._by_seed()
        self._totals.zero_()
        seen: dict[str, Any] = {
            "averaged": averaged,
            "skipped": None if self.skipping is None else self.skipping.count(),
            "noise": None if self.noise is None else self.noise.take(),
        }
        records: list[tuple[Metrics, dict[str, Any]]] = []
        for own, result in zip(totals, results, strict=True):
            metrics = measured(self._decisions, done, own, result, task=self._step.task, **seen)
            images = position(done) - position(self.clock.since)
            records.append((metrics, timed(metrics, images, runs=len(results), **spent)))
        return records

    def skipped(self) -> dict[str, int]:
        """For a run's summary, how many images were skipped since it began, where any may be."""
        return {} if self.skipping is None else {"skipped": int(self.skipping.skipped.item())}

    def _by_seed(self) -> list[list[float]]:
        return self._totals.T.cpu().numpy().tolist()

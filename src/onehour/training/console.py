"""What people and their experiment trackers are told of a run, as it starts and while it trains; process 0 only.

A bar on a terminal, plain lines elsewhere. A tracker is a class of three methods; one that fails never stops a run.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from onehour.config import Recipe
from onehour.data.sources import Data
from onehour.entry import is_entry, resolve
from onehour.messages import blame, encodable, nearest, say
from onehour.rules.decay import parameter_groups
from onehour.rules.layers import frozen_statistics
from onehour.rules.muon import hidden_weights
from onehour.rules.names import match_names
from onehour.training.measure import Metrics
from onehour.training.record import Metric
from onehour.training.statistics import tracked_layers


class Console:
    """Prints a run's progress.

    Args:
        quiet: print nothing; for every process but the first.
        warns: print what a person should know all the same, behind this.
    """

    def __init__(self, recipe: Recipe, *, quiet: bool, warns: str | None = None) -> None:
        self.recipe, self.warns = recipe, warns
        self.terminal = Terminal(quiet=quiet, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.terminal,
            disable=quiet or not self.terminal.is_terminal,
            transient=True,
        )

    def start(self, iteration: int, iterations: int, *, processes: int, folder: Any, rules: str) -> None:
        r = self.recipe
        rate = f"rate {r.base_lr:g} → {r.target_lr:g}" if r.warms_up else f"rate {r.target_lr:g}"
        before = "".join(f"minibatch {s.minibatch} until epoch {until}, then " for s, until in r.stages[:-1])
        self._say(
            f"{r.name}: {before}minibatch {r.minibatch} = {r.workers.workers} workers × {r.per_worker} on {processes}"
            f" process{'es' * (processes > 1)}, {rate}, {r.epochs:g} epoch{'s' * (r.epochs > 1)},"
            f" {'at most ' * (r.scaling == 'adascale')}{iterations} iterations, seed {r.seed}"
        )
        where = f" at iteration {iteration}" if iteration else ""
        self._say(f"{'resumes' if iteration else 'writes'} {folder}{where}")
        self._say(rules)
        for remark in r.remarks:
            self.warn(remark)
        with self._unheard():
            self._progress.start()
        self._task = self._progress.add_task("training", total=iterations, completed=iteration)

    def step(self, iteration: int) -> None:
        if not self._progress.disable:
            with self._unheard():
                self._progress.update(self._task, completed=iteration)

    def evaluated(self, metrics: Metrics, images_per_second: float) -> None:
        """An evaluation is done; one that is made up for after a restart follows no image, and has no rate."""
        samples = "images" if metrics.metrics is None else "samples"
        rate = f"  {images_per_second:8,.0f} {samples}/s" if images_per_second else ""
        if metrics.metrics is None:
            found = f" train error {metrics.train_error:6.2f} %  validation error {metrics.error:6.2f} %"
            if metrics.ema_error is not None:
                found += f" averaged {metrics.ema_error:6.2f} %"
        else:
            loss = f" train loss {metrics.train_loss:<8.4g}" if metrics.iteration else f"{'':>12}untrained"
            found = f"{loss}  validation {_named(metrics.metrics)}"
        self._say(
            f"epoch {metrics.epoch:>3g}/{self.recipe.epochs:g}  iteration {metrics.iteration:>6}"
            f"  rate {metrics.lr:<8.4g}{found}{rate}"
        )

    def warn(self, text: str) -> None:
        """Something that a person should know, and that stops nothing."""
        if self.warns is None:
            self._say(f"warning: {text}")
        else:
            print(f"{self.warns}warning: {text}")

    def close(self) -> None:
        with self._unheard():
            self._progress.stop()

    def _say(self, line: str) -> None:
        with self._unheard():
            self.terminal.print(encodable(line, self.terminal.encoding), markup=False)

    @contextmanager
    def _unheard(self) -> Generator[None]:
        """A run goes on where its output finds a full disk, or a pipe that nobody reads any more: there rich exits."""
        try:
            yield
        except (OSError, SystemExit):
            self.terminal.begin_capture()
            with suppress(OSError, SystemExit):
                self.terminal.end_capture()  # forgets the line: it would be said again with each other


def _named(metrics: dict[str, float]) -> str:
    said = [(Metric.called(name), value) for name, value in metrics.items()]
    return ", ".join(f"{metric.name} {metric.of(value)}" for metric, value in said)


def effects(recipe: Recipe, model: nn.Module, data: Data | None = None) -> str:
    """What the rules did to this model, in a line: BatchNorm's n, zero γ, weight decay, and what else was asked for.

    Args:
        data: whose division for validation is said in another line.
    """
    layers = tracked_layers(model)
    weights = [layer.weight for layer in layers]
    zeros = sum(weight is not None and not weight.any() for weight in weights)  # pyright: ignore[reportUnnecessaryComparison]
    decayed, *kept = (
        len(group["params"]) for group in parameter_groups(model, weight_decay=recipe.target_weight_decay)
    )
    gammas = "" if recipe.init else f", γ = 0 in {zeros} of them"  # a resume does not know those that it began with
    whose = "BatchNorm" if recipe.batchnorm == "ghost" else "the network's own BatchNorm, one worker a pass, hence"
    line = "; ".join(
        (
            f"{whose} over n = {recipe.per_worker} in {len(layers)} layers{gammas}",
            f"weight decay {recipe.target_weight_decay:g} on {decayed} of {decayed + sum(kept)} tensors",
            *_asked_for(recipe, model),
        )
    )
    if data is None or not recipe.validation:
        return line
    train, held = (look.samples for look in data.looks)
    return f"{line}\nvalidation {recipe.validation:g} of each class: {train} samples train, {held} validate"


def _asked_for(recipe: Recipe, model: nn.Module) -> Iterator[str]:
    """What a recipe says beyond the paper's, of this model."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if recipe.freeze:
        every, layers = len([*model.parameters()]), frozen_statistics(model)
        yield f"{every - len(trained)} of {every} tensors frozen, and BatchNorm's statistics in {layers} layers"
    for pattern, names in match_names([*recipe.rate_factors], trained, what="layer_rates", of="parameter").items():
        yield f"rate × {recipe.rate_factors[pattern]:g} on {len(names)} of {len(trained)} tensors ({pattern})"
    if recipe.optimizer == "muon":
        yield f"{len(hidden_weights(model))} of {len(trained)} tensors orthogonalised, the rest by SGD"
    if recipe.clip_norm is not None:
        yield f"gradients clipped to a norm of {recipe.clip_norm:g}"
    if recipe.target_ema is not None:
        yield f"weights averaged with ρ = {recipe.target_ema:g}"


class Logger(Protocol):
    """What `--log package.module:Class` must have; it is built without arguments, on process 0."""

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        """A run begins or resumes."""

    def log(self, record: dict[str, Any]) -> None:
        """An evaluation: the line of metrics.jsonl."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The run ends: summary.json."""


class TensorBoard:
    """Writes event files under the run's folder, for `tensorboard --logdir`."""

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, record: dict[str, Any]) -> None:
        own = {f"{kind}/{name}": x for kind in ("metrics", "train_metrics") for name, x in record.get(kind, {}).items()}
        for name, value in (record | own).items():
            if isinstance(value, float):
                self.writer.add_scalar(name, value, record["iteration"])
        self.writer.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        self.writer.close()


class WandB:
    """Sends to Weights & Biases under the run's folder name."""

    def start(self, recipe: dict[str, Any], folder: Path) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.run: Any = wandb.init(  # pyright: ignore[reportUnknownMemberType]
            project="onehour", name=folder.name, dir=str(folder), config=recipe, resume="allow"
        )

    def log(self, record: dict[str, Any]) -> None:
        self.run.log(record, step=record["iteration"])

    def finish(self, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)
        self.run.finish()


NAMED = {"tensorboard": TensorBoard, "wandb": WandB}


def load_logger(spec: str | None) -> Logger | None:
    """The logger of `--log`."""
    if spec is None:
        return None
    if spec in NAMED:
        try:
            __import__(spec)
        except ImportError as error:
            raise ValueError(f"--log {spec} needs a package: pip install 'onehour[{spec}]'") from error
        return NAMED[spec]()
    if not is_entry(spec):
        raise ValueError(f"no logger is called {spec!r}; expected {nearest(spec, NAMED)}, or package.module:Class")
    try:
        logger = resolve("logger", spec)()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"logger {spec} failed when called: {blame(error)}") from error
    missing = [name for name in ("start", "log", "finish") if not callable(getattr(logger, name, None))]
    if missing:
        raise ValueError(f"logger {spec} has no method {missing[0]}; expected start, log and finish")
    return logger


class Loggers:
    """Calls a logger until it fails, once says so, and goes on without it."""

    def __init__(self, logger: Logger | None) -> None:
        self.logger = logger

    def tell(self, method: Literal["start", "log", "finish"], *arguments: Any) -> None:
        if self.logger is None:
            return
        try:
            getattr(self.logger, method)(*arguments)
        except Exception as error:
            name = type(self.logger).__name__
            say(f"warning: {name}.{method} failed ({error}); the run goes on without it", sys.stderr)
            self.logger = None

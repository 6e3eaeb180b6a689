"""What a batch adds to a run's sums: classification, or a task of one's own (paper §3, Remark 3)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onehour.config import Recipe
from onehour.data.dataset import Classes
from onehour.data.loader import moved, prepared, prepared_batch
from onehour.data.samples import mapped
from onehour.data.sources import Data, refuse_known_labels
from onehour.dist.devices import out_of_memory
from onehour.entry import resolve
from onehour.messages import blame
from onehour.rules.batchnorm import ghost_layers

__all__ = ["Sums"]

Model = Callable[..., Any]


@dataclass(frozen=True)
class Sums:
    """What a task returns for a batch: sums over what this worker saw, and the count they belong to.

    Loss, gradient and metrics are divided once, by the sums of the counts over all workers of an iteration, or over all
    validation data: Σᵢ loss / Σᵢ count. A mean of workers' means would weigh each sample of a worker with few more.

    Args:
        loss: Σ of the losses, of shape (), with its graph.
        count: how many losses those are: a number, or a tensor of shape ().
        metrics: of each name (Σ a, Σ b); the metric is Σ a / Σ b. A last word "%" or in brackets is its unit. The first
            is the run's; with none it is the loss.
        higher_is_better: the names of those metrics where more is better.

    >>> def segmentation(model, batch):
    ...     images, masks = batch
    ...     logits, valid = model(images), masks != 255
    ...     losses = F.cross_entropy(logits, masks, ignore_index=255, reduction="sum")
    ...     wrong = ((logits.argmax(1) != masks) & valid).sum()
    ...     return Sums(losses, valid.sum(), {"pixel error %": (100 * wrong, valid.sum())})
    >>> masks = torch.tensor([[[0, 1], [255, 1]]])
    >>> segmentation(lambda images: torch.zeros(1, 2, 2, 2), (None, masks)).metrics
    {'pixel error %': (tensor(200), tensor(3))}
    """

    loss: Tensor
    count: Tensor | float
    metrics: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict[str, Any])
    higher_is_better: Collection[str] = ()


@dataclass(frozen=True)
class Found:
    """What a batch adds to the rows of a task's sums; of shape () or (1,) a row for one seed, (S,) for S seeds."""

    loss: Tensor
    others: Tensor
    """The rows behind the loss, (R − 1, S), or what broadcasts to it."""


@dataclass(frozen=True)
class Evaluation:
    """What a model gets wrong, or what a task of one's own adds up."""

    errors: int | None
    """None where the task is one's own."""
    samples: int
    loss: float
    """Mean of the losses; not finite where the model's outputs are not, though every sample is."""
    metrics: dict[str, float] = field(default_factory=dict[str, float])
    """Of a task of one's own, the run's first."""

    @property
    def error(self) -> float:
        """Errors in percent of the samples; the run's metric where the task is one's own."""
        return next(iter(self.metrics.values())) if self.errors is None else 100 * self.errors / self.samples


class Classification:
    """Σ of the samples' cross-entropies, and how many the model gets wrong.

    A sample for which the model gives NaN is an error.
    """

    counts = False
    """Whether the count is known only behind the forward pass; else it is the number of samples."""
    rows = 2
    """R: how many sums a batch has, its loss first; with `counts` the count is the second."""
    higher_is_better: tuple[str, ...] = ()
    """The names of metrics where more is better."""

    def __call__(self, model: Model, batch: Any, recipe: Recipe, *, evaluating: bool = False) -> Found:
        """Its rows: loss, errors.

        Args:
            batch: images (N, C, …) with labels (N,); of S seeds as one network (N, S·C, …) with (N, S). Of mixed
                images, what `Mixing` gives: an error is counted against the label with the larger share.
            evaluating: add up in float64, and smooth no labels.
        """
        images, labels, *mixed = batch
        logits = self.logits(model, images, recipe)
        logits = logits.double() if evaluating else logits
        if labels.ndim > 1:
            logits = logits.view(labels.numel(), -1)
        smoothing = 0.0 if evaluating else recipe.label_smoothing
        loss = summed_cross_entropy(logits, labels, *mixed, smoothing=smoothing)
        with torch.no_grad():
            largest, chosen = logits.max(1)
            wrong = chosen.view_as(labels) != labels
            if evaluating:  # training ends at a loss that is not finite, and counts none of that iteration
                wrong |= largest.view_as(labels).isnan()
        return Found(loss, wrong.sum(0))

    def prove(self, model: nn.Module, recipe: Recipe, data: Data, device: torch.device) -> None:
        """Be asked the first time, by validation data; the model must have an output for each class."""
        outputs = outputs_of(model, recipe, data, device)
        if recipe.classes is None or outputs >= recipe.classes:
            return
        misfit = f"the model has {outputs} outputs, the data {recipe.classes} classes"
        try:
            refuse_known_labels(data, Classes(outputs, "the model's outputs"))
        except ValueError as error:
            raise ValueError(f"{misfit}; {error}") from error
        raise ValueError(misfit)

    def evaluated(self, rows: Sequence[float], samples: int) -> Evaluation:
        """What the sums over all validation data say."""
        return Evaluation(errors=int(rows[1]), samples=samples, loss=rows[0] / samples)

    def trained(self, rows: Sequence[float], iterations: int, images: int) -> tuple[float, dict[str, float]]:
        """The run's metric, and all metrics of a task of one's own, of some iterations' sums.

        Args:
            rows: Σ of the iterations' mean losses, then of their other rows.
            images: that they took.
        """
        return 100 * rows[1] / images, {}

    def logits(self, model: Model, images: Tensor, recipe: Recipe) -> Tensor:
        """The model's logits, in float32 again after autocast: in bfloat16 a sum over kn would be coarse."""
        images = _as_computed(images, recipe)
        halved = recipe.precision == "bf16"
        try:
            with _autocast(images.device, recipe):
                logits = model(images)
        except Exception as error:
            if out_of_memory(error):
                raise
            taken = f"{tuple(images.shape[1:])}, {images.dtype}"
            hint = "" if halved or images.dtype == torch.float32 else "; give float32 images, or precision float64"
            raise ValueError(f"the model cannot take the data's images {taken}: {blame(error)}{hint}") from error
        if not torch.is_tensor(logits) or logits.ndim != 2 or not logits.is_floating_point():
            shape = type(logits).__name__
            if torch.is_tensor(logits):
                shape = f"{tuple(logits.shape)}" + ("" if logits.is_floating_point() else f" of {logits.dtype}")
            raise ValueError(
                f"the model returned {shape}; expected logits of shape (N, classes), or a task of your own (--task)"
            )
        return logits.float() if halved else logits


CLASSIFICATION = Classification()
COUNTED_NOTHING = (
    "the task counted nothing over all workers of iteration {}: a mean over none has no value; leave out the samples"
    " that count nothing, or use a larger minibatch"
)


def summed_cross_entropy(logits: Tensor, labels: Tensor, *mixed: Tensor, smoothing: float = 0.0) -> Tensor:
    """Σ CE(y) over the samples; of mixed images Σ s·CE(y₁) + (1 − s)·CE(y₂).

    With smoothing ε the target of class y is 1 − ε + ε/C, of every other one ε/C, as in torch's cross-entropy.

    Args:
        logits: (N, C); of S seeds as one network (N·S, C).
        labels: y or y₁, (N,); of S seeds (N, S), whose sums are (S,).
        mixed: y₂ and s, (N,) each, where images are mixed.
    """
    if labels.ndim == 1 and not mixed:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none", label_smoothing=smoothing).view(labels.shape)
    if mixed:
        others, shares = mixed
        shares = shares.to(losses.dtype)
        second = F.cross_entropy(logits, others, reduction="none", label_smoothing=smoothing)
        losses = shares * losses + (1 - shares) * second
    return losses.sum(0)


class OwnTask:
    """A function (model, batch) → `Sums`; its count is known only once all workers have theirs.

    Args:
        device: where its sums must lie.
    """

    counts = True

    def __init__(self, function: Callable[[Model, Any], Sums], name: str, device: torch.device) -> None:
        self.function, self.name, self.device = function, name, device
        self.metrics: tuple[str, ...] | None = None
        """The names, once it was asked the first time."""
        self.higher_is_better: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Loss, count, and two for each metric."""
        assert self.metrics is not None
        return 2 + 2 * len(self.metrics)

    def __call__(self, model: Model, batch: Any, recipe: Recipe, *, evaluating: bool = False) -> Found:
        """Its rows: Σ loss, Σ count, and Σ a, Σ b of each metric."""
        batch = mapped(batch, partial(_as_computed, recipe=recipe))
        try:
            with _autocast(self.device, recipe):
                sums = self.function(model, batch)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise ValueError(f"task {self.name} failed: {blame(error)}") from error
        if not isinstance(sums, Sums):  # pyright: ignore[reportUnnecessaryIsInstance]
            kind = type(sums).__name__
            raise ValueError(f"task {self.name} returned a {kind}; expected onehour.Sums(loss=Σ, count=Σ)")
        loss: Any = sums.loss
        if not torch.is_tensor(loss) or not loss.is_floating_point():
            kind = loss.dtype if torch.is_tensor(loss) else type(loss).__name__
            raise ValueError(f"task {self.name}: its loss is a {kind}; expected a floating-point tensor with its graph")
        names = tuple(sums.metrics)
        if self.metrics is None:
            self.metrics, self.higher_is_better = names, self._known(sums)
        elif names != self.metrics:
            before, now = (", ".join(each) or "none" for each in (self.metrics, names))
            raise ValueError(f"task {self.name} named its metrics {before} at first, and {now} now: keep their names")
        dtype = torch.float64 if evaluating else sums.loss.dtype if recipe.precision != "bf16" else torch.float32
        pairs = [self._pair(name, sums.metrics[name]) for name in names]
        numbers = [self._number("count", sums.count), *(n for pair in pairs for n in pair)]
        loss = self._number("loss", sums.loss)
        return Found(loss.to(dtype), torch.stack([n.detach().to(dtype) for n in numbers])[:, None])

    @torch.no_grad()
    def prove(self, model: nn.Module, recipe: Recipe, data: Data, device: torch.device) -> None:
        """Be asked the first time, for a validation sample twice and for it four times: sums double."""

        def asked(samples: int) -> tuple[float, float]:
            batch = mapped(data.form.batch([data.looks[1].sample] * samples), partial(moved, device=device))
            found = self(model, prepared_batch(data.validation, batch), recipe, evaluating=True)
            return float(found.loss), float(found.others[0])

        model.eval()
        (loss, count), (doubled, counted) = asked(2), asked(4)
        same = math.isfinite(loss) and loss != 0 and math.isclose(doubled, loss, rel_tol=1e-3)
        if same and (math.isclose(counted, 2 * count) or counted == count):
            raise ValueError(
                f"task {self.name} returns a mean: for all samples twice its loss is {doubled:.6g} as for once. Return"
                " sums (reduction='sum') and how many losses they add; the division by the count over all workers"
                " is done once, here (Remark 3)"
            )

    def evaluated(self, rows: Sequence[float], samples: int) -> Evaluation:
        if rows[1] == 0:
            raise ValueError(f"task {self.name} counted nothing in all {samples} validation samples: its count is 0")
        loss = rows[0] / rows[1]
        return Evaluation(errors=None, samples=samples, loss=loss, metrics=self._divided(rows, loss))

    def trained(self, rows: Sequence[float], iterations: int, images: int) -> tuple[float, dict[str, float]]:
        metrics = self._divided(rows, rows[0] / iterations)
        return next(iter(metrics.values())), metrics

    def _divided(self, rows: Sequence[float], loss: float) -> dict[str, float]:
        """Each metric as Σ a / Σ b; the loss where there is none."""
        names = self.metrics or ()
        pairs = {name: rows[2 + 2 * number : 4 + 2 * number] for number, name in enumerate(names)}
        return {name: a / b if b else math.nan for name, (a, b) in pairs.items()} or {"loss": loss}

    def _known(self, sums: Sums) -> tuple[str, ...]:
        unknown = [name for name in sums.higher_is_better if name not in sums.metrics]
        if unknown:
            raise ValueError(f"task {self.name}: higher_is_better names {unknown[0]!r}, which is none of its metrics")
        return tuple(sums.higher_is_better)

    def _pair(self, name: str, pair: Any) -> tuple[Tensor, Tensor]:
        kind = pair.__class__
        if not issubclass(kind, tuple | list) or len(pair) != 2:
            raise ValueError(f"task {self.name}: metric {name!r} is a {kind.__name__}; expected (Σ a, Σ b)")
        one, other = (self._number(f"metric {name!r}", value) for value in pair)
        return one, other

    def _number(self, what: str, value: Any) -> Tensor:
        if torch.is_tensor(value):
            if value.numel() != 1:
                raise ValueError(f"task {self.name}: its {what} has shape {tuple(value.shape)}; expected one number")
            if value.device.type != self.device.type:
                raise ValueError(
                    f"task {self.name}: its {what} lies on {value.device}, the model on {self.device}; add it up there"
                )
            return value.reshape(())
        if not isinstance(value, int | float):
            raise ValueError(f"task {self.name}: its {what} is a {type(value).__name__}; expected one number")
        return torch.full((), float(value), dtype=torch.float64, device=self.device)


Task = Classification | OwnTask
"""What a step and an evaluation add up of what a run learns."""


def task_of(recipe: Recipe, given: Callable[[Model, Any], Sums] | None, device: torch.device) -> Task:
    """A recipe's task."""
    if recipe.task is None:
        return CLASSIFICATION
    return OwnTask(resolve("task", recipe.task) if given is None else given, recipe.task, device)


def _autocast(device: torch.device, recipe: Recipe) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if recipe.precision == "bf16" else nullcontext()


def _as_computed(leaf: Any, recipe: Recipe) -> Any:
    """A tensor of a batch in the recipe's precision and order in memory."""
    if not isinstance(leaf, Tensor):
        return leaf
    if recipe.precision == "float64" and leaf.is_floating_point():
        leaf = leaf.double()
    last = recipe.channels_last and leaf.ndim == 4
    return leaf.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@torch.no_grad()
def outputs_of(model: nn.Module, recipe: Recipe, data: Data, device: torch.device) -> int:
    """How many outputs a classifier has, by one validation image, so that a misfit is one message before the run."""
    image = prepared(data.validation, data.looks[1].image[None].to(device))
    model.eval()
    return CLASSIFICATION.logits(model, image, recipe).shape[1]


def classes_of(recipe: Recipe, data: Data, model: nn.Module, device: torch.device) -> Classes:
    """What labels must be: of the recipe's classes, else of the model's outputs."""
    if recipe.classes is None:
        return Classes(outputs_of(model, recipe, data, device), "the model's outputs")
    return Classes(recipe.classes, "the data's classes" if recipe.classes == data.classes else "the recipe's classes")


def refuse_training_output(model: nn.Module, recipe: Recipe, image: Tensor) -> None:
    """Refuse what a classifier returns in training, where its copy without memory can tell; else its first pass does.

    Args:
        image: as the model takes it, (C, H, W).
    """
    bare = {id(tensor): _bare(tensor) for tensor in chain(model.parameters(), model.buffers())}
    batch = torch.empty((recipe.per_worker, *image.shape), dtype=image.dtype, device="meta")
    seen: list[tuple[nn.Module, Tensor]] = []
    random: Any = torch.random  # which has no types
    try:
        with random.fork_rng(devices=[]):
            copied = copy.deepcopy(model, dict(bare)).train()
            for layer in ghost_layers(copied):
                layer.seen = seen
            logits = copied(batch)
    except Exception:  # it computes with the values
        return
    refuse_rows(seen, workers=1)
    if not torch.is_tensor(logits) or logits.ndim != 2:
        shape = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(
            f"the model returned {shape} in training; expected logits of shape (N, classes): leave its auxiliary"
            " outputs out"
        )


def _bare(tensor: Tensor) -> Tensor:
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def refuse_rows(seen: Iterable[tuple[Any, Tensor]], workers: int) -> None:
    """Refuse a BatchNorm that is given more rows than a pass has samples, such as every token of an image.

    Args:
        seen: ghost layers with the statistics that each has of a pass, (2, g, C).
        workers: g of the pass.
    """
    for layer, statistics in seen:
        n, found = layer.per_worker, statistics.shape[1]
        if found != workers:
            raise ValueError(
                f"a BatchNorm of {layer.num_features} channels is given {found * n} rows for {workers * n} samples, so"
                f" groups of {n} are not those of a worker; use --batchnorm keep"
            )

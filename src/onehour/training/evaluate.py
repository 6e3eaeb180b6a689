"""What a network gets wrong on all validation data, while it trains or afterwards, and what it says of image files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onehour.config import Recipe
from onehour.data.dataset import FaultError, KeyedDataset
from onehour.data.listing import image_by_name, read_file
from onehour.data.loader import CHUNK, Feed
from onehour.data.sources import Data, FileReader, Look, complete, file_reader, image_options
from onehour.dist.devices import own_numbers, pick_device, seed_torch
from onehour.dist.group import Group
from onehour.dist.watchdog import never
from onehour.execution import Execution
from onehour.messages import blame, shown
from onehour.rules.keys import seed_for
from onehour.rules.minibatch import whole_workers
from onehour.training.build import build_model
from onehour.training.feeds import pick_loaders, refuse_batch
from onehour.training.record import refuse_other_classes, run_of
from onehour.training.state import Network, model_state
from onehour.training.statistics import EvaluationStoppedError, Recalibration
from onehour.training.task import CLASSIFICATION, Classification, Evaluation, Found, Model, Task, classes_of, task_of
from onehour.training.weights import fit, read_weights

IMAGES = 8192
"""Training images that statistics are measured with unless told otherwise, or all where there are fewer."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    feed: Feed,
    recipe: Recipe,
    *,
    group: Group,
    task: Task = CLASSIFICATION,
    seeds: int = 1,
    stop_asked: Callable[[], bool] = never,
) -> list[Evaluation]:
    """Evaluate on every sample once; for each of the model's seeds.

    Chunks of 256 consecutive samples are dealt to the processes in turn. Each chunk's sums have a place of their own in
    the vector that is summed, so that no order of adding depends on p.

    Args:
        feed: of the validation data.
        seeds: S, how many networks the model is.
        stop_asked: whether to leave early: on a slow device an evaluation may take hours. Asked before each chunk.
        task: what a chunk adds, as `classification`.

    Raises:
        InputError: where the loss is not finite because a sample is not; in all processes, naming it.
        EvaluationStoppedError: in all processes together, once any was asked to stop.
        ValueError: where a task of one's own has counted nothing.
    """
    every = -(-feed.samples // CHUNK)
    own = range(group.rank, every, group.size)
    sums = torch.zeros(every, task.rows, seeds, dtype=torch.float64, device=group.device)
    was_training = model.training
    model.eval()
    try:
        batches = feed.chunks(own)
        with own_numbers(group.device):
            for turn in range(-(-every // group.size)):  # as many for each process, whoever has a chunk less
                if group.any(stop_asked()):
                    raise EvaluationStoppedError
                if turn < len(own):
                    chunk, batch = own[turn], next(batches)
                    seed_torch(seed_for(recipe.seed, "evaluation", chunk), group.device)  # a task may draw numbers
                    found = task(model, batch, recipe, evaluating=True)
                    sums[chunk, 0], sums[chunk, 1:] = found.loss, found.others
    finally:
        model.train(was_training)
    by_seed = group.sum(sums).cpu().permute(2, 1, 0).numpy().tolist()
    bad = ([chunk for chunk, loss in enumerate(losses) if not math.isfinite(loss)] for losses, *_ in by_seed)
    for chunk in sorted({chunks[0] for chunks in bad if chunks}):
        batch = next(feed.chunks(range(chunk, chunk + 1)))
        if seeds > 1:  # all have the same
            batch = batch[0].chunk(seeds, 1)[0], batch[1]
        first = chunk * CHUNK
        count = min(CHUNK, feed.samples - first)
        refuse_batch(batch, lambda row, first=first: feed.called(first + row), samples=count, own=feed.own)
    return [task.evaluated([sum(row) for row in rows], feed.samples) for rows in by_seed]


class Evaluator:
    """Evaluates a run's network as its recipe says: with recalibrated statistics, and its averaged weights as well.

    Args:
        feed: of the validation data.
        data: whose training images recalibrate, where the recipe asks for it.
    """

    def __init__(
        self,
        network: Network,
        feed: Feed,
        recipe: Recipe,
        data: Data,
        *,
        group: Group,
        task: Task = CLASSIFICATION,
    ) -> None:
        self._network, self._recalibration = network, None
        if recipe.recalibrate is not None:
            options: Any = {"images": recipe.recalibrate, "loaders": feed.loaders, "group": group, "task": task}
            self._recalibration = Recalibration(network.model, recipe, data, **options)
        self._evaluate = partial(
            evaluate, network.model, feed, recipe, group=group, task=task, seeds=len(network.parts)
        )

    def __call__(self, stop_asked: Callable[[], bool] = never) -> tuple[list[Evaluation], Evaluation | None]:
        """Of each seed, and of the averaged weights where there are some; errors as of `evaluate`."""
        results = self._with_the_weights(stop_asked)
        if self._network.average is None:
            return results, None
        with self._network.average.in_place():
            (averaged,) = self._with_the_weights(stop_asked)
        return results, averaged

    def _with_the_weights(self, stop_asked: Callable[[], bool]) -> list[Evaluation]:
        """That the model has now."""
        with nullcontext() if self._recalibration is None else self._recalibration.applied(stop_asked):
            return self._evaluate(stop_asked=stop_asked)

    def close(self) -> None:
        if self._recalibration is not None:
            self._recalibration.close()


@dataclass(frozen=True)
class ClassErrors:
    """What a model gets wrong of one class."""

    name: str
    errors: int
    samples: int

    @property
    def error(self) -> float | None:
        """In percent of the class's samples; None where there are none."""
        return 100 * self.errors / self.samples if self.samples else None


@dataclass(frozen=True)
class WeightsEvaluation(Evaluation):
    """An `Evaluation`, and what it says of the five likeliest classes and of each class."""

    top5_errors: int | None = None
    """Samples whose class is not among the five likeliest; None for five classes or fewer."""
    by_class: list[ClassErrors] = field(default_factory=list[ClassErrors])

    @property
    def top5_error(self) -> float | None:
        """Top-5 errors in percent of the samples."""
        return None if self.top5_errors is None else 100 * self.top5_errors / self.samples


class OpenedWeights:
    """A model with the weights of a run or a file, converted as in training, and the recipe's data.

    Args:
        source, ema: as for `read_weights`.
        recipe: names model and data, and the precision.
        data: (train, validation) in place of the recipe's.
        augments: whether training images are read as in training, with the recipe's train_transform.
    """

    def __init__(
        self,
        source: Path,
        *,
        recipe: Recipe,
        data: Any = None,
        device: str = "auto",
        ema: bool = False,
        augments: bool = False,
    ) -> None:
        weights = read_weights(source, ema=ema)
        self.recipe, self.data = complete(recipe, data, trains=False, augments=augments)
        if (run := run_of(source)) is not None:
            refuse_other_classes(run, self.data.names)
        self.device = torch.device(pick_device(device))
        self.task = task_of(self.recipe, None, self.device)
        self.model = build_model(self.recipe, self.data, self.device, task=self.task)
        fit(self.model, weights, source)

    def evaluate(self) -> WeightsEvaluation:
        recipe, data = self.recipe, self.data
        classes = None if self.task.counts else classes_of(recipe, data, self.model, self.device)
        counts = None if classes is None else _Counts(classes.count, self.device)
        seed, loaders = seed_for(recipe.seed, "validation"), pick_loaders(Execution(), data)
        options: Any = {"loaders": loaders, "device": self.device, "look": data.looks[1], "form": data.form}
        with closing(Feed(data.validation, seed=seed, classes=classes, **options)) as feed:
            found = evaluate(self.model, feed, recipe, group=Group(device=self.device), task=counts or self.task)[0]
        if classes is None or counts is None:
            return WeightsEvaluation(None, found.samples, found.loss, found.metrics)
        names = data.names if len(data.names) == classes.count else list(map(str, range(classes.count)))
        errors, samples = (tensor.cpu().numpy().tolist() for tensor in (counts.errors, counts.samples))
        top5 = int(counts.top5)
        by_class = [ClassErrors(*row) for row in zip(names, errors, samples, strict=True)]
        five = top5 if classes.count > 5 else None
        return WeightsEvaluation(found.errors, found.samples, found.loss, top5_errors=five, by_class=by_class)


class _Counts(Classification):
    """Classification, and integer counts beside its sums."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.errors, self.samples = torch.zeros(2, classes, dtype=torch.int64, device=device)
        self.top5 = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, model: Model, batch: Any, recipe: Recipe, *, evaluating: bool = False) -> Found:
        kept: list[Tensor] = []

        def watched(images: Tensor) -> Any:
            kept.append(model(images))
            return kept[0]

        found = super().__call__(watched, batch, recipe, evaluating=evaluating)
        logits, labels = kept[0], batch[1]
        largest, chosen = logits.max(1)
        wrong = (chosen != labels) | largest.isnan()
        classes = len(self.samples)
        self.samples += labels.bincount(minlength=classes)
        self.errors += labels[wrong].bincount(minlength=classes)
        five = logits.topk(min(5, logits.shape[1])).indices
        self.top5 += ((five != labels[:, None]).all(1) | largest.isnan()).sum()
        return found


@dataclass(frozen=True)
class Recalibrated:
    """A model evaluated with its running averages, and with statistics of so many training images."""

    images: int
    before: WeightsEvaluation
    after: WeightsEvaluation
    weights: dict[str, Tensor]
    """Its state dict, on the CPU, with the new statistics."""


def recalibrated(
    source: Path,
    *,
    recipe: Recipe,
    images: int | None = None,
    device: str = "auto",
    ema: bool = False,
) -> Recalibrated:
    """Recalibrate the weights of a run, or of a file; nothing is written.

    Args:
        images: training images; None for the recipe's number, else `IMAGES` or all if there are fewer.
    """
    opened = OpenedWeights(source, recipe=recipe, device=device, ema=ema, augments=True)
    if images is None:
        most, n = min(IMAGES, opened.data.looks[0].samples), recipe.per_worker
        images = recipe.recalibrate or max(1, most // n) * n
    else:  # here, where they have the name that they were given by
        whole_workers("--images", images, per_worker=recipe.per_worker, samples=opened.data.looks[0].samples)
    group, loaders = Group(device=opened.device), pick_loaders(Execution(), opened.data)
    with closing(
        Recalibration(
            opened.model, opened.recipe, opened.data, images=images, group=group, loaders=loaders, task=opened.task
        )
    ) as recalibration:
        before = opened.evaluate()
        recalibration.apply()
    return Recalibrated(images, before, opened.evaluate(), model_state(opened.model))


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The image files that paths name, in the order of the paths.

    Of a folder, all files below it that are named as images, in the order of their paths' parts. Names that begin with
    a dot are passed over; links are followed, each folder once.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        inside = _below(path, set()) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path} holds no files that are named as images")
        found += inside
    return found


def _below(folder: Path, seen: set[tuple[int, int]]) -> list[Path]:
    about = folder.stat()
    if (about.st_dev, about.st_ino) in seen:
        return []
    seen.add((about.st_dev, about.st_ino))
    found: list[Path] = []
    for name in sorted(name for name in os.listdir(folder) if not name.startswith(".")):
        path = folder / name
        if path.is_dir():
            found += _below(path, seen)
        elif image_by_name(name):
            found.append(path)
    return found


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image: (class, probability) of the likeliest, in that order; or why there is nothing."""

    path: Path
    classes: list[tuple[str, float]]
    problem: str = ""


class Predictor:
    """A run's network, and how it reads image files.

    Args:
        recipe: completed, or of a file with its classes.
    """

    def __init__(self, source: Path, *, recipe: Recipe, device: str = "auto") -> None:
        if recipe.task is not None:
            raise ValueError(
                f"predict gives classes, and task {recipe.task} has none; load the exported weights instead"
            )
        weights = read_weights(source)
        self.recipe, self.device = recipe, torch.device(pick_device(device))
        division: Any = {"share": recipe.validation, "seed": recipe.seed}
        self._reader = file_reader(recipe.data, **division, **image_options(recipe))
        self.model = build_model(recipe, _data_of(recipe, _Files([], self._reader)), self.device)
        fit(self.model, weights, source)
        with torch.no_grad():
            one = self._reader.dataset.prepare(self._reader.image[None].to(self.device))
            self.outputs = CLASSIFICATION.logits(self.model.eval(), one, recipe).shape[1]
        run = run_of(source)
        self.names = (run.class_names if run is not None else []) or self._reader.names()

    @torch.no_grad()
    def predict(
        self, paths: Sequence[Path], *, top: int, done: Callable[[int], object] = lambda images: None
    ) -> Iterator[Prediction]:
        """The `top` likeliest classes of each image, by softmax, in the order of the paths.

        Args:
            top: at most `outputs`, the model's classes.
            done: is told how many images each batch had.
        """
        files = _Files(paths, self._reader)
        data = _data_of(self.recipe, files)
        # A process that loads takes longer to start than some images to read.
        loaders = min(pick_loaders(Execution(device=self.device.type), data), len(paths) // CHUNK)
        with closing(Feed(files, seed=0, loaders=loaders, device=self.device, look=data.looks[1])) as feed:
            batches = feed.chunks(range(-(-len(paths) // CHUNK)))
            for number, (images, readable) in enumerate(batches):
                logits = CLASSIFICATION.logits(self.model, images, self.recipe).double()
                largest = logits.softmax(1).topk(top)
                values, labels = (tensor.cpu().numpy().tolist() for tensor in largest)
                finite = logits.isfinite().all(1).cpu().numpy().tolist()
                for row, able in enumerate(readable.cpu().numpy().tolist()):
                    path = paths[number * CHUNK + row]
                    if not able:
                        yield Prediction(path, [], files.problem(number * CHUNK + row))
                        continue
                    if not finite[row]:
                        raise ValueError(f"{path}: the model's outputs are NaN or infinite")
                    pairs = zip(labels[row], values[row], strict=True)
                    yield Prediction(path, [(self._named(label), value) for label, value in pairs])
                done(len(images))

    def _named(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else str(label)


class _Files(KeyedDataset):
    """Image files as (image, whether it could be read): one that could not is black, and ends nothing."""

    def __init__(self, paths: Sequence[Path], reader: FileReader) -> None:
        self.paths, self.reader = paths, reader

    def __len__(self) -> int:
        return len(self.paths)

    def keyed(self, index: int, key: int) -> tuple[Tensor, bool]:
        try:
            return self._read(index), True
        except Exception:  # what someone's `from_file` raises, too
            return self.reader.image, False

    def prepare(self, images: Tensor) -> Tensor:
        return self.reader.dataset.prepare(images)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def problem(self, index: int) -> str:
        """Why an image cannot be read, in a line."""
        try:
            self._read(index)
        except ValueError as error:
            return shown(str(error))
        except Exception as error:
            return shown(f"{self.paths[index]} cannot be read: {blame(error)}")
        return shown(f"{self.paths[index]} could not be read when it was needed")

    def _read(self, index: int) -> Tensor:
        path, like = str(self.paths[index]), self.reader.image
        image = self.reader.dataset.from_file(read_file(path), path)
        if image.shape != like.shape or image.dtype != like.dtype:
            kinds = [f"{tuple(kind.shape)} of {kind.dtype}" for kind in (image, like)]
            raise FaultError(path, f"was read as {kinds[0]}, and the run's images are {kinds[1]}", "resize it first")
        return image


def _data_of(recipe: Recipe, files: _Files) -> Data:
    """Files as both sides of a run's data, of which a model's shape follows."""
    image: Any = files.reader.image
    look = Look(len(files), image, recipe.classes)
    return Data(files, files, recipe.classes, image.shape[0], (look, look))

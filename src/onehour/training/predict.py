"""What a run's weights say of image files: the likeliest classes, with the run's own test-time transform."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onehour.config import Recipe
from onehour.data.dataset import FaultError, KeyedDataset
from onehour.data.listing import image_by_name, read_file
from onehour.data.loader import CHUNK, Feed
from onehour.data.sources import Data, FileReader, Look, file_reader, image_options
from onehour.dist.devices import pick_device
from onehour.execution import Execution
from onehour.messages import blame, shown
from onehour.training.build import build_model
from onehour.training.hosting import pick_loaders
from onehour.training.record import Run
from onehour.training.task import CLASSIFICATION
from onehour.training.weights import fit, read_weights


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
        self._reader = file_reader(recipe.data, **image_options(recipe))
        self.model = build_model(recipe, _data_of(recipe, _Files([], self._reader)), self.device)
        fit(self.model, weights, source)
        with torch.no_grad():
            one = self._reader.dataset.prepare(self._reader.image[None].to(self.device))
            self.outputs = CLASSIFICATION.logits(self.model.eval(), one, recipe).shape[1]
        names = Run(source).class_names if source.is_dir() else []
        self.names = names or self._reader.names()

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

"""A model's weights outside its run: read, fitted to a model, evaluated."""

from __future__ import annotations

import warnings
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load  # pyright: ignore[reportUnknownVariableType]
from safetensors.torch import load_file as load_safetensors  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from onehour.config import Recipe
from onehour.data.loader import Feed
from onehour.data.sources import complete
from onehour.dist.devices import pick_device
from onehour.dist.group import Group
from onehour.execution import Execution
from onehour.messages import shown
from onehour.rules.keys import seed_for
from onehour.rules.minibatch import whole_workers
from onehour.sidefile import is_object
from onehour.training.build import build_model, classes_of
from onehour.training.checkpoint import latest_contents
from onehour.training.evaluate import Recalibration, evaluate
from onehour.training.hosting import pick_loaders
from onehour.training.record import Run
from onehour.training.state import averages_in, model_state
from onehour.training.store import Store, checkpoint_folders, digest_of_recipe
from onehour.training.task import Classification, Evaluation, Found, Model, task_of

FORMATS = (".safetensors", ".pt", ".pth")
INSIDE = ("state_dict", "model")
"""Where trainers' checkpoints have the weights, beside what else they hold."""
WRAPPERS = ("module.", "_orig_mod.")
"""What every name begins with where DDP's or torch.compile's wrapper was saved in place of the model."""

IMAGES = 8192
"""Training images that statistics are measured with unless told otherwise, or all where there are fewer."""


def read_weights(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The weights and buffers in a run's newest verified checkpoint, in one of its checkpoints, or in a file.

    A .pt file is read with `weights_only=True` alone: nothing in it is executed.

    Args:
        ema: a run's averaged weights in place of its weights, with the buffers beside these.
    """
    weights = weights_in(path, bytes_of(path))
    if not ema:
        return weights
    if not path.is_dir():
        raise ValueError(f"--ema is for a run's folder, which may hold weights and their average; {path} is a file")
    contents = latest_contents(Run(path).folder)
    averages = averages_in(load(contents[1])) if contents is not None else {}
    if not averages:
        raise ValueError(f"{path} keeps no average of its weights: its recipe has no ema")
    return weights | averages


def bytes_of(path: Path) -> bytes:
    """The file that holds the weights, whole: of a run or a checkpoint its model.safetensors, once it is verified."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    whole = path.absolute()
    folder = whole.parent.parent
    if whole in checkpoint_folders(folder):
        try:
            return Store(folder, recipe=digest_of_recipe(Run(folder).recipe)).verified(whole).contents[0]
        except ValueError as error:
            raise ValueError(f"{path} is no checkpoint that can be trusted: {error}") from error
    if path.is_dir():
        contents = latest_contents(Run(path).folder)
        if contents is None:
            raise ValueError(f"{path} has no checkpoint yet")
        return contents[0]
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path} is not a weights file; expected a run's folder or a file ending in {', '.join(FORMATS)}"
        )
    if not path.is_file():  # a pipe, say, which would be waited for
        raise ValueError(f"{path} is not a regular file")
    try:
        return path.read_bytes()
    except (OSError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as weights: {_line(error)}") from error


def weights_in(path: Path, content: bytes) -> dict[str, Tensor]:
    """The weights and buffers in what `bytes_of` gave; of a file under the model's own names, without `WRAPPERS`."""
    ours = path.is_dir()
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch says of odd files beside refusing them
            if ours or path.suffix == ".safetensors":
                state: Any = load(content)
            elif content[257:262] == b"ustar":  # torch would unpack it into a folder before it refuses it
                raise ValueError("it is in the oldest of torch's formats, a tar; load it there, and save it again")
            else:
                state = torch.load(BytesIO(content), "cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, MemoryError) as error:
        raise ValueError(f"{path} cannot be read as weights: {_line(error)}") from error
    except Exception as error:  # torch raises its unpickler's own class for what weights_only refuses
        raise ValueError(f"{path} holds more than tensors, or is damaged; it was not loaded") from error
    if is_object()(state):
        state = next((state[name] for name in INSIDE if is_object()(state.get(name))), state)
    if not (is_object()(state) and state and all(isinstance(name, str) for name in state)):
        raise ValueError(f"{path} holds no state dict of tensors")
    for name, tensor in state.items():
        if not torch.is_tensor(tensor):
            raise ValueError(f"{path} holds no state dict of tensors: {shown(name)} is a {type(tensor).__name__}")
        plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
        if not plain or tensor.nbytes > tensor.untyped_storage().nbytes():  # a few bytes may claim to be terabytes
            raise ValueError(f"{path}: {shown(name)} is not a plain tensor; expected one that is stored as it is")
    found = {str(name): tensor.detach() for name, tensor in state.items()}
    while not ours and (wrapper := next((w for w in WRAPPERS if all(name.startswith(w) for name in found)), None)):
        found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    return found


def fit(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Load weights into a model, strictly."""
    own = model.state_dict()
    # num_batches_tracked is younger than many files; with a fixed momentum nothing reads it.
    missing = [name for name in own if name not in weights and not name.endswith("num_batches_tracked")]
    extra = [name for name in weights if name not in own]
    wrong = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or extra:
        parts = (f"it {verb} {few(names)}" for verb, names in (("lacks", missing), ("also has", extra)) if names)
        raise ValueError(f"{source} is of another model: {' and '.join(parts)}")
    if wrong:
        there, here = tuple(weights[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise ValueError(f"{source} is of another model: {shown(wrong[0])} is {there}, expected {here}")
    model.load_state_dict(weights, strict=False)


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
    """

    def __init__(
        self, source: Path, *, recipe: Recipe, data: Any = None, device: str = "auto", ema: bool = False
    ) -> None:
        weights = read_weights(source, ema=ema)
        self.recipe, self.data = complete(recipe, data, trains=False)
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


def evaluate_weights(source: Path, **options: Any) -> WeightsEvaluation:
    """The error on the recipe's validation data of the weights in `source`; arguments as of `OpenedWeights`."""
    return OpenedWeights(source, **options).evaluate()


def load_file(path: Path, suffix: str) -> Any:
    """What a file of weights holds; anything but tensors and plain containers of them is refused."""
    return load_safetensors(path) if suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)


def _line(error: BaseException) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


def few(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    return shown(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    opened = OpenedWeights(source, recipe=recipe, device=device, ema=ema)
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

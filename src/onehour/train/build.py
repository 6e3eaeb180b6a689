"""From a recipe to the things that run it: device, data, model, optimizer; everything wrong is found here."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.loader import in_memory, prepared
from onehour.data.sources import Data, load_data
from onehour.data.work import cores
from onehour.dist.group import Group
from onehour.dist.placement import place, place_by_halving
from onehour.entry import blame, resolve
from onehour.execution import Execution
from onehour.models.load import brings_weights, load_model
from onehour.rules.batchnorm import convert_batchnorm, ghost_layers
from onehour.rules.decay import NORMALISATION, parameter_groups
from onehour.rules.initialize import initialize
from onehour.rules.keys import seed_for
from onehour.train.memory import out_of_memory

__all__ = [
    "build_model",
    "build_optimizer",
    "complete",
    "draws_numbers",
    "effects",
    "pick_device",
    "pick_loaders",
    "pick_share",
    "pick_workers_per_pass",
]

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}
PASS_BYTES = {"cpu": 2**20, "cuda": 2**27}
"""Images a fused pass may hold: on the CPU, activations should stay in the caches; a GPU must be kept busy."""


def complete(recipe: Recipe, data: Any = None, *, trains: bool = True) -> tuple[Recipe, Data]:
    """Load the data, and write into the recipe what only the data knows.

    Args:
        recipe: names the data, unless `data` is given.
        data: (train, validation) as objects.
        trains: False evaluates alone, which takes data of any size: N stays open.

    Raises:
        ValueError: for unusable data, or a minibatch larger than it where it trains.
    """
    if data is None:
        skip = recipe.bad_images == "skip"
        loaded = load_data(recipe.data, exif=recipe.exif_orientation, pixels=recipe.pixel_cap, skip=skip)
    elif isinstance(data, tuple | list) and len(data) == 2:
        loaded = Data.of(*data)
    else:
        raise ValueError(f"data is a {type(data).__name__}; expected (train, validation)")
    classes = recipe.classes or loaded.classes
    if classes is not None and loaded.classes is not None and classes < loaded.classes:
        raise ValueError(f"classes is {classes}, but the data has labels up to {loaded.classes - 1}")
    samples = len(loaded.train) if trains else None
    return recipe.replace(samples=samples, classes=classes, **_facts(recipe, loaded)), loaded


def _facts(recipe: Recipe, data: Data) -> dict[str, Any]:
    """How images are read, as the data has it; other data must not be asked for it."""
    usual = Recipe()
    known = {"bad_images": usual.bad_images, "exif_orientation": usual.exif_orientation, "pixel_cap": usual.pixel_cap}
    facts = getattr(data.train, "facts", None)
    if facts is None and any(getattr(recipe, name) != value for name, value in known.items()):
        raise ValueError(f"{', '.join(known)} are for images in a folder, an index or a pack; leave them out")
    return facts or {"resized": None}


def pick_device(device: str) -> str:
    """ "cuda" where asked for or available, else "cpu".

    Raises:
        ValueError: if a GPU is asked for and there is none.

    >>> pick_device("cpu")
    'cpu'
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def build_model(
    recipe: Recipe, data: Data, device: torch.device, model: nn.Module | Callable[[], nn.Module] | None = None
) -> nn.Module:
    """The model with its initial weights, keyed by the recipe's seed, converted to BatchNorm over n, on the device.

    A model that comes as an object or from package.module:function keeps the weights it came with.

    Raises:
        ValueError: if it cannot be built, converted, or run on the data.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(recipe.seed, "weights"))
        if isinstance(model, nn.Module):
            built = model
        elif model is not None:
            built = model()
        else:
            built = load_model(recipe.model, channels=data.channels, classes=recipe.classes)
            if not brings_weights(recipe.model):
                initialize(built, zero_gamma=recipe.zero_gamma)
    built = convert_batchnorm(built, recipe.per_worker)
    if recipe.precision == "float64":
        built = built.double()
    built = built.to(device)
    _try(built, recipe, data, device)
    return built.to(memory_format=torch.channels_last) if recipe.channels_last else built  # type: ignore[call-overload]


@torch.no_grad()
def _try(model: nn.Module, recipe: Recipe, data: Data, device: torch.device) -> None:
    """One validation image through the model, so that a misfit is one message before the run."""
    image = prepared(data.validation, data.validation[0][0][None].to(device))
    image = image.double() if recipe.precision == "float64" else image
    model.eval()
    try:
        logits = model(image)
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ValueError(f"the model cannot take the data's images {tuple(image.shape[1:])}: {blame(error)}") from error
    if not torch.is_tensor(logits) or logits.ndim != 2:
        shape = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(f"the model returned {shape}; expected logits of shape (N, classes)")
    if recipe.classes is not None and logits.shape[1] < recipe.classes:
        raise ValueError(f"the model has {logits.shape[1]} outputs, the data {recipe.classes} classes")


def effects(recipe: Recipe, model: nn.Module) -> str:
    """What the rules did to this model, in a line: BatchNorm's n, zero γ, weight decay.

    >>> from onehour.models.small import resnet8
    >>> effects(Recipe(weight_decay=1e-4), convert_batchnorm(initialize(resnet8()), 32))
    'BatchNorm over n = 32 in 9 layers, γ = 0 in 3 of them; weight decay 0.0001 on 11 of 29 tensors'
    """
    ghosts = ghost_layers(model)
    zeros = sum(layer.weight is not None and not layer.weight.any() for layer in ghosts)
    decayed, *kept = (len(group["params"]) for group in parameter_groups(model, weight_decay=recipe.weight_decay))
    return (
        f"BatchNorm over n = {recipe.per_worker} in {len(ghosts)} layers, γ = 0 in {zeros} of them;"
        f" weight decay {recipe.weight_decay:g} on {decayed} of {decayed + sum(kept)} tensors"
    )


def build_optimizer(
    recipe: Recipe, model: nn.Module, *, without: tuple[type[nn.Module], ...] = NORMALISATION
) -> Optimizer:
    """The recipe's optimizer, its weight decay by parameter group (Remark 1).

    Args:
        without: module types whose parameters do not decay.

    Raises:
        ValueError: for an unknown name, or a class that cannot be built.
    """
    groups = parameter_groups(model, weight_decay=recipe.weight_decay, without=without)
    lr = recipe.schedule(0.0)
    if recipe.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
        if recipe.momentum:
            # Zero is what torch's first step starts from; having it at once lets that step be masked and saved.
            for parameter in (p for group in sgd.param_groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if recipe.optimizer in OPTIMIZERS:
        return OPTIMIZERS[recipe.optimizer](groups, lr=lr)
    make = resolve("optimizer", recipe.optimizer)
    takes = inspect.signature(make).parameters
    options = {"momentum": recipe.momentum} if "momentum" in takes else {}
    try:
        return make(groups, lr=lr, **options)
    except Exception as error:
        raise ValueError(f"optimizer {recipe.optimizer} cannot be built: {blame(error)}") from error


def pick_share(recipe: Recipe, group: Group) -> range:
    """The workers that this process hosts.

    >>> pick_share(Recipe(), Group())
    range(0, 8)
    """
    division = place_by_halving if recipe.reduce == "canonical" else place
    return division(recipe.workers.workers, group.size)[group.rank]


def pick_workers_per_pass(execution: Execution, recipe: Recipe, data: Data, model: nn.Module, device: str) -> int:
    """How many workers share a pass: what was asked for, else as many as `PASS_BYTES` of images allow.

    One where the model draws random numbers (dropout), since those are keyed by the pass; and for channels_last, where
    fusing would copy.
    """
    if recipe.reduce == "canonical":
        if (execution.workers_per_pass or 1) > 1:
            raise ValueError("reduce canonical takes one worker a pass: leave --workers-per-pass out, or reduce fast")
        return 1
    share = max(len(share) for share in place(recipe.workers.workers, execution.processes))
    if execution.workers_per_pass is not None:
        return min(execution.workers_per_pass, share)
    if recipe.channels_last or draws_numbers(model):
        return 1
    worker = data.validation[0][0].numel() * 4 * recipe.per_worker
    return max(1, min(share, PASS_BYTES[device] // worker))


def draws_numbers(model: nn.Module) -> bool:
    """Whether the model's forward pass draws random numbers: dropout, drop-path.

    >>> draws_numbers(nn.Dropout()), draws_numbers(nn.Linear(2, 1))
    (True, False)
    """
    return any(
        isinstance(module, nn.modules.dropout._DropoutNd) or getattr(module, "drop_prob", 0)
        for module in model.modules()
    )


def pick_loaders(execution: Execution, data: Data) -> int:
    """Processes that load for each process: none for tensors in memory, else its share of the cores."""
    if execution.loaders is not None:
        return execution.loaders
    if in_memory(data.train):
        return 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(execution.processes)))
    return max(1, cores() // local)

"""From a recipe to the things that run it: device, data, model, optimizer; everything wrong is found here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.dataset import Classes, KeyedDataset, in_memory, refuse_labels
from onehour.data.loader import Feed, moved, prepared, prepared_batch
from onehour.data.loader_processes import PATIENCE
from onehour.data.mixing import refuse_mixing
from onehour.data.samples import Form, Keyed, mapped
from onehour.data.sources import Data, load_data
from onehour.dist.devices import pick_device
from onehour.dist.group import Group
from onehour.dist.launched import launched
from onehour.dist.placement import place, place_by_halving
from onehour.dist.reducer import is_dense
from onehour.entry import is_entry, resolve
from onehour.execution import Execution
from onehour.machine import own_share
from onehour.messages import blame
from onehour.models.load import MODELS, brings_weights, call, load_model
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.decay import NORMALISATION, parameter_groups
from onehour.rules.initialize import init_weights_
from onehour.rules.keys import seed_for
from onehour.rules.layers import freeze_, frozen_statistics, scale_rates
from onehour.rules.muon import Muon, hidden_weights, muon_groups
from onehour.rules.names import match_names
from onehour.rules.probe import is_adaptive, unwrapped
from onehour.rules.shuffle import SampleStream
from onehour.training.kept_batchnorm import refuse_synchronised, tracked_layers
from onehour.training.refusals import refuse_model
from onehour.training.task import CLASSIFICATION, Task, task_of

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}
ON_CUDA: dict[str, dict[str, Any]] = {
    "adam": {"fused": True, "capturable": True},
    "adamw": {"fused": True, "capturable": True},
    "rmsprop": {"capturable": True},
    "adagrad": {},
    "nadam": {"capturable": True},
    "radam": {"capturable": True},
}
"""So that an update neither waits for the device nor needs a number of the host's; not in float64.

On the device the rate, and what nadam and radam count with, are float32.
"""
OF_IMAGES = ("bad_images", "exif_orientation", "pixel_cap", "image_size", "test_resize", "train_transform")
"""Fields of `ImageOptions`, which data of another kind must not be asked for."""
PASS_BYTES = {"cpu": 2**20, "cuda": 2**28}
"""Images a fused pass may hold: on the CPU, activations should stay in the caches; a GPU must be kept busy."""


def complete(
    recipe: Recipe,
    data: Any = None,
    *,
    collate: Callable[[list[Any]], Any] | None = None,
    trains: bool = True,
) -> tuple[Recipe, Data]:
    """Load the data, and write into the recipe what only the data knows.

    Args:
        recipe: names the data, unless `data` is given.
        data: (train, validation) as objects, or one to divide.
        trains: False evaluates alone, which takes data of any size: N stays open.
    """
    if recipe.task is not None and is_entry(recipe.task):
        resolve("task", recipe.task)  # a wrong name is said before anything that takes longer
    if collate is None and recipe.collate is not None:
        collate = resolve("collate", recipe.collate)
    form = Form(own=recipe.task is not None, collate=collate)
    if data is None:
        division: Any = {"share": recipe.validation, "seed": recipe.seed}
        loaded = load_data(recipe.data, form, **division, **image_options(recipe, trains=trains))
    else:
        loaded = Data.given(data, "data is a", recipe.validation, recipe.seed, form)
    classes = recipe.classes or loaded.classes
    if classes is not None and not form.own:
        _refuse_labels(loaded, Classes(classes, "the recipe's classes" if recipe.classes else "its largest label"))
        if loaded.classes is not None and classes < loaded.classes:
            raise ValueError(f"classes is {classes}, but the data has labels up to {loaded.classes - 1}")
    samples = None
    if trains:
        samples = loaded.looks[0].samples
        refuse_mixing(recipe, loaded.looks[0].image)
    return recipe.replace(samples=samples, classes=classes, **_facts(recipe, loaded)), loaded


def image_options(recipe: Recipe, *, trains: bool = False) -> dict[str, Any]:
    """How a recipe reads images at a path: options of `ImageOptions`."""
    options = {name: getattr(recipe, name) for name in OF_IMAGES}
    return options if trains else options | {"train_transform": ""}


def _refuse_labels(data: Data, classes: Classes) -> None:
    """Check what lies in memory, before anything lies on a device."""
    for side, dataset in (("training", data.train), ("validation", data.validation)):
        if in_memory(dataset):
            refuse_labels(dataset.tensors[1], classes, Keyed(dataset, 0, side=side).called)


def _facts(recipe: Recipe, data: Data) -> dict[str, Any]:
    """How images are read, as the data has it; other data must not be asked for it."""
    usual, facts = Recipe(), data.train.facts if isinstance(data.train, KeyedDataset) else None
    facts = {"resized": None} | (facts or {})
    asked = [name for name in OF_IMAGES if name not in facts and getattr(recipe, name) != getattr(usual, name)]
    if asked:
        raise ValueError(
            f"{', '.join(asked)}: such fields are for images in a folder, an index or a pack; leave them out"
        )
    return facts


def build_model(
    recipe: Recipe,
    data: Data,
    device: torch.device,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    task: Task | None = None,
) -> nn.Module:
    """The model with its initial weights, keyed by the recipe's seed, converted to BatchNorm over n, on the device.

    A model that comes as an object or from package.module:function keeps the weights it came with.

    Args:
        task: of one's own, which is tried on a sample; None for the recipe's.
    """
    random: Any = torch.random  # which has no types
    with random.fork_rng(devices=[]):
        random.manual_seed(seed_for(recipe.seed, "weights"))
        if isinstance(model, nn.Module):
            built = model
        elif model is not None:
            built = call("the model's function", model)
        else:
            built = load_model(recipe.model, channels=data.channels, classes=recipe.classes)
            if not brings_weights(recipe.model):
                init_weights_(built, zero_gamma=recipe.zero_gamma)
    if recipe.batchnorm == "keep":
        refuse_synchronised(built)
    else:
        built = convert_batchnorm(built, recipe.per_worker)
    built = freeze_(built, recipe.freeze)
    if recipe.precision == "float64":
        built = built.double()
    built = built.to(device)
    if recipe.task is not None:
        _prove(task or task_of(recipe, None, device), built, recipe, data)
        refuse_model(built, recipe, None)
        return _in_order(built, recipe)
    outputs = outputs_of(built, recipe, data, device)
    if recipe.classes is not None and outputs < recipe.classes:
        misfit = f"the model has {outputs} outputs, the data {recipe.classes} classes"
        try:
            _refuse_labels(data, Classes(outputs, "the model's outputs"))
        except ValueError as error:
            raise ValueError(f"{misfit}; {error}") from error
        raise ValueError(misfit)
    if model is not None or recipe.model not in MODELS:  # ours are known
        refuse_model(built, recipe, prepared(data.validation, data.looks[1].image[None])[0])
    return _in_order(built, recipe)


def _in_order(model: nn.Module, recipe: Recipe) -> nn.Module:
    return model.to(memory_format=torch.channels_last) if recipe.channels_last else model  # type: ignore[call-overload]


def _prove(task: Task, model: nn.Module, recipe: Recipe, data: Data) -> None:
    """Ask a task of one's own the first time, by a validation sample."""
    model.eval()
    sample, device = data.looks[1].sample, next(model.parameters()).device
    batches = [mapped(data.form.batch([sample] * size), partial(moved, device=device)) for size in (2, 4)]
    some, twice = (prepared_batch(data.validation, batch) for batch in batches)
    task.prove(model, some, twice, recipe)


def classes_of(recipe: Recipe, data: Data, model: nn.Module, device: torch.device) -> Classes:
    """What labels must be: of the recipe's classes, else of the model's outputs."""
    if recipe.classes is None:
        return Classes(outputs_of(model, recipe, data, device), "the model's outputs")
    return Classes(recipe.classes, "the data's classes" if recipe.classes == data.classes else "the recipe's classes")


@torch.no_grad()
def outputs_of(model: nn.Module, recipe: Recipe, data: Data, device: torch.device) -> int:
    """How many outputs the model has, by one validation image, so that a misfit is one message before the run."""
    image = prepared(data.validation, data.looks[1].image[None].to(device))
    model.eval()
    return CLASSIFICATION.logits(model, image, recipe).shape[1]


def effects(recipe: Recipe, model: nn.Module) -> str:
    """What the rules did to this model, in a line: BatchNorm's n, zero γ, weight decay, and what else was asked for.

    >>> from onehour.models.resnet import resnet8
    >>> effects(Recipe(weight_decay=1e-4), convert_batchnorm(init_weights_(resnet8()), 32))
    'BatchNorm over n = 32 in 9 layers, γ = 0 in 3 of them; weight decay 0.0001 on 11 of 29 tensors'
    """
    layers = tracked_layers(model)
    weights = [layer.weight for layer in layers]
    zeros = sum(weight is not None and not weight.any() for weight in weights)  # pyright: ignore[reportUnnecessaryComparison]
    decayed, *kept = (
        len(group["params"]) for group in parameter_groups(model, weight_decay=recipe.target_weight_decay)
    )
    gammas = "" if recipe.init else f", γ = 0 in {zeros} of them"  # a resume does not know those that it began with
    whose = "BatchNorm" if recipe.batchnorm == "ghost" else "the network's own BatchNorm, one worker a pass, hence"
    return "; ".join(
        (
            f"{whose} over n = {recipe.per_worker} in {len(layers)} layers{gammas}",
            f"weight decay {recipe.target_weight_decay:g} on {decayed} of {decayed + sum(kept)} tensors",
            *_asked_for(recipe, model),
        )
    )


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
        yield f"gradients cut to a norm of {recipe.clip_norm:g}"
    if recipe.target_ema is not None:
        yield f"weights averaged with ρ = {recipe.target_ema:g}"


def build_optimizer(
    recipe: Recipe, model: nn.Module, *, without: tuple[type[nn.Module], ...] = NORMALISATION
) -> Optimizer:
    """The recipe's optimizer, its weight decay by parameter group (Remark 1).

    Args:
        without: module types whose parameters do not decay.
    """
    groups = parameter_groups(model, weight_decay=recipe.target_weight_decay, without=without)
    lr = recipe.schedule(0.0)
    if recipe.layer_rates:
        groups = scale_rates(groups, model, recipe.rate_factors, lr=lr)
    if recipe.optimizer == "sgd":
        fused = all(is_dense(p) for group in groups for p in group["params"])  # else it would write into the gaps
        sgd = torch.optim.SGD(groups, lr=lr, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=fused)
        if recipe.momentum:
            # Zero is what torch's first step starts from; having it at once lets that step be masked and saved.
            for parameter in (p for group in sgd.param_groups for p in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if recipe.optimizer == "muon":
        return Muon(muon_groups(groups, model), lr=lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
    if recipe.optimizer in OPTIMIZERS:
        on_cuda = next(model.parameters()).is_cuda and recipe.precision != "float64"
        options = dict(ON_CUDA[recipe.optimizer]) if on_cuda else {}
        if recipe.adam is not None:
            options |= {"betas": recipe.adam["betas"], "eps": recipe.adam["eps"]}
        return OPTIMIZERS[recipe.optimizer](groups, lr=lr, **options)
    make = resolve("optimizer", recipe.optimizer)
    takes = inspect.signature(make).parameters
    options = {"momentum": recipe.momentum} if "momentum" in takes else {}
    try:
        optimizer = make(groups, lr=lr, **options)
    except Exception as error:
        raise ValueError(f"optimizer {recipe.optimizer} cannot be built: {blame(error)}") from error
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise ValueError(f"optimizer {recipe.optimizer} returned {kind}; expected a torch.optim.Optimizer")
    if recipe.scales_linearly and is_adaptive(unwrapped(optimizer)):
        recipe.refuse_linear()
    return optimizer


class Feeds(NamedTuple):
    training: Feed
    validation: Feed

    def close(self) -> None:
        self.training.close()
        self.validation.close()


def open_feeds(
    recipe: Recipe,
    data: Data,
    execution: Execution,
    model: nn.Module,
    stream: SampleStream,
    group: Group,
    *,
    warn: Callable[[str], None] | None = None,
) -> Feeds:
    """Both sides of a run's data, as this process loads them.

    Args:
        model: whose outputs the labels must be, where the recipe does not say.
        warn: is told of processes that were replaced, in process 0.
    """
    classes = None if data.form.own else classes_of(recipe, data, model, group.device)
    loaders = pick_loaders(execution, data)
    # A stuck loader is replaced long before the watchdog would end the run for it.
    patience = execution.hang_timeout / 4 if execution.hang_timeout else PATIENCE
    options: Any = {"patience": patience, "warn": warn if group.rank == 0 else None}
    feed = partial(Feed, loaders=loaders, device=group.device, classes=classes, form=data.form, **options)
    return Feeds(
        feed(data.train, seed=recipe.seed, stream=stream, look=data.looks[0]),
        feed(data.validation, seed=seed_for(recipe.seed, "validation"), look=data.looks[1]),
    )


def pick_share(recipe: Recipe, group: Group) -> range:
    """The workers that this process hosts."""
    division = place_by_halving if recipe.reduce == "canonical" else place
    return division(recipe.workers.workers, group.size)[group.rank]


def pick_workers_per_pass(execution: Execution, recipe: Recipe, data: Data, model: nn.Module, device: str) -> int:
    """How many workers share a pass: what was asked for, else as many as `PASS_BYTES` of images allow.

    One where the model draws random numbers (dropout), since those are keyed by the pass; for channels_last, where
    fusing would copy; and for a task of one's own, which may look at all samples of its worker together.
    """
    alone = {
        "reduce canonical": (recipe.reduce == "canonical", "reduce fast"),
        "batchnorm keep": (recipe.batchnorm == "keep", "batchnorm ghost"),
        "scaling adascale": (recipe.scaling == "adascale", "another scaling"),
    }
    for one, (asked, several) in alone.items():
        if asked and (execution.workers_per_pass or 1) > 1:
            raise ValueError(f"{one} takes one worker a pass: leave --workers-per-pass out, or {several}")
    if any(asked for asked, _ in alone.values()):
        return 1
    shares = {len(share) for share in place(recipe.workers.workers, execution.processes)}
    together = execution.workers_per_pass
    if together is None:
        one = (recipe.channels_last and device != "cuda") or draws_numbers(model) or recipe.task is not None
        together = 1 if one else PASS_BYTES[device] // (data.looks[1].image.numel() * 4 * recipe.per_worker)
    together = max(1, min(together, max(shares)))
    if not recipe.compile and (device != "cuda" or execution.workers_per_pass is not None):
        return together  # sizes cost nothing here, and bits of runs that exist depend on them
    equal = max(size for size in range(1, together + 1) if not any(share % min(size, share) for share in shares))
    # For each size a graph is compiled, or kernels are chosen; only the first is worth more passes.
    more = any(-(-share // equal) > -(-share // together) for share in shares)
    return together if more and not recipe.compile else equal


def draws_numbers(model: nn.Module) -> bool:
    """Whether the model's forward pass draws random numbers: dropout, drop-path."""
    return any(
        isinstance(module, nn.modules.dropout._DropoutNd)  # pyright: ignore[reportPrivateUsage]
        or any(_drops(vars(module).get(name)) for name in ("drop_prob", "drop_rate"))
        for module in model.modules()
    )


def _drops(probability: Any) -> bool:
    """Whether an attribute of timm's or torchvision's says so; one of someone's may hold anything."""
    return isinstance(probability, int | float) and probability > 0


def pick_loaders(execution: Execution, data: Data, share: int | None = None) -> int:
    """Processes that load for each process: none for tensors in memory; half of its cores, or all for a GPU.

    Args:
        share: cores of this process; None divides the machine's.
    """
    if execution.loaders is not None:
        return execution.loaders
    if in_memory(data.train) and data.form.collate is None:
        return 0
    share = own_share(launched().local_size or execution.processes) if share is None else share
    return max(1, share if pick_device(execution.device) == "cuda" else share // 2)

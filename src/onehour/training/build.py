"""From a recipe to what it trains: the model with its initial weights, and the optimizer over its groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.dataset import Classes
from onehour.data.loader import moved, prepared, prepared_batch
from onehour.data.samples import mapped
from onehour.data.sources import Data, refuse_known_labels
from onehour.dist.reducer import is_dense
from onehour.entry import resolve
from onehour.messages import blame
from onehour.models.load import MODELS, brings_weights, call, load_model
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.decay import NORMALISATION, parameter_groups
from onehour.rules.initialize import init_weights_
from onehour.rules.keys import seed_for
from onehour.rules.layers import freeze_, scale_rates
from onehour.rules.muon import Muon, muon_groups
from onehour.rules.probe import is_adaptive, unwrapped
from onehour.training.refusals import refuse_model, refuse_synchronised
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
            refuse_known_labels(data, Classes(outputs, "the model's outputs"))
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

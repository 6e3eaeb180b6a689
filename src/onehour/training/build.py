"""From a recipe to what it trains: the model with its initial weights, and the optimizer over its groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.data.loader import prepared
from onehour.data.sources import Data
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
from onehour.training.state import refuse_model, refuse_synchronised
from onehour.training.task import Task, refuse_training_output, task_of

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
}
ON_CUDA = {"fused": ("adam", "adamw"), "capturable": ("adam", "adamw", "rmsprop", "nadam", "radam")}
"""So that an update neither waits for the device nor needs a number of the host's, which is a float32 there."""


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
    task = task or task_of(recipe, None, device)
    task.prove(built, recipe, data, device)
    ours = model is None and recipe.model in MODELS  # which are known
    if task.counts or not ours:
        refuse_model(built)
    if not (task.counts or ours):
        refuse_training_output(built, recipe, prepared(data.validation, data.looks[1].image[None])[0])
    return built.to(memory_format=torch.channels_last) if recipe.channels_last else built  # type: ignore[call-overload]


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
        options: dict[str, Any] = {
            option: True for option, names in ON_CUDA.items() if on_cuda and recipe.optimizer in names
        }
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

"""What a process hosts of a run: which workers, how many of them share a pass, and how it loads their samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from onehour.config import Recipe
from onehour.data.dataset import in_memory
from onehour.data.loader import Feed
from onehour.data.loader_processes import PATIENCE
from onehour.data.sources import Data
from onehour.dist.devices import pick_device
from onehour.dist.group import Group
from onehour.dist.launched import launched
from onehour.dist.placement import place, place_by_halving
from onehour.execution import Execution
from onehour.machine import own_share
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream
from onehour.training.build import classes_of

PASS_BYTES = {"cpu": 2**20, "cuda": 2**28}
"""Images a fused pass may hold: on the CPU, activations should stay in the caches; a GPU must be kept busy."""


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
    """Whether the model's forward pass draws random numbers: dropout, timm's and torchvision's drop-path."""
    return any(
        isinstance(module, nn.modules.dropout._DropoutNd)  # pyright: ignore[reportPrivateUsage]
        or any(isinstance(p, int | float) and p > 0 for p in map(vars(module).get, ("drop_prob", "drop_rate")))
        for module in model.modules()
    )


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

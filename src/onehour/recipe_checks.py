"""What no recipe can have: values that a field cannot be, and fields that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from onehour.messages import nearest
from onehour.rules.minibatch import whole_workers
from onehour.rules.ramp import parse_ramp

ADAPTIVE = ("adam", "adamw", "rmsprop", "adagrad", "nadam", "radam", "muon")
"""Optimizers whose step does not grow with the gradient, so that the linear rule's argument does not hold for them."""

ADAM = ("adam", "adamw", "nadam", "radam")
"""Those with two averages, whose β the square-root rule scales too."""

PITFALLS = (
    "gradient-sum-not-mean",
    "decay-on-batchnorm",
    "momentum-inside-uncorrected",
    "overlapping-shards",
    "batchnorm-stats-of-rank-0",
    "batchnorm-stats-k-times",
    "warmup-per-epoch",
)
"""What training loops get wrong; a run can do one of them on purpose, to measure its cost (training/decisions.py)."""


def refuse_values(recipe: Any, hints: Mapping[str, Any]) -> None:
    """Refuse what a field cannot be."""
    for name, hint in hints.items():
        value, choices = getattr(recipe, name), get_args(hint)
        if name == "precision" and value == "fp16":
            raise ValueError(
                "precision fp16 is not offered: it needs loss scaling, whose skipped updates depend on the"
                " hardware; use bf16, which has float32's range"
            )
        if choices and all(isinstance(c, str) for c in choices) and value not in choices:
            raise ValueError(f"{name} is {value!r}; expected {nearest(str(value), choices)}")
        if hint is bool and not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, got {value!r}")
        if hint is str and not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {value!r}")
    named = ("sgd", *ADAPTIVE)
    if recipe.optimizer not in named and ":" not in recipe.optimizer:
        raise ValueError(
            f"no optimizer is called {recipe.optimizer!r}; expected {nearest(recipe.optimizer, named)},"
            " or package.module:Class"
        )
    if recipe.pitfall is not None and recipe.pitfall not in PITFALLS:
        raise ValueError(f"no pitfall is called {recipe.pitfall!r}; expected {nearest(recipe.pitfall, PITFALLS)}")


def refuse_together(recipe: Any) -> None:
    """Refuse fields that each may be so, but not together."""
    if recipe.random_erasing > 1:
        raise ValueError(f"random_erasing is a probability, so at most 1; got {recipe.random_erasing}")
    if (recipe.mixup or recipe.cutmix) and recipe.per_worker == 1:
        raise ValueError("mixup and cutmix mix a worker's own images: per_worker must be at least 2, got 1")
    if recipe.samples is not None and recipe.minibatch > recipe.samples:
        raise ValueError(
            f"minibatch {recipe.minibatch} is larger than the data set of {recipe.samples} samples;"
            f" use a minibatch of at most {recipe.samples}"
        )
    mixes = [name for name in ("mixup", "cutmix", "random_erasing", "label_smoothing") if getattr(recipe, name)]
    if recipe.task is not None and mixes:
        raise ValueError(f"{', '.join(mixes)}: for classification; a task of your own does it itself")
    if recipe.task is not None and recipe.validation:
        raise ValueError("validation divides by class; a task of your own brings (train, validation)")
    if recipe.collate is not None and recipe.task is None:
        raise ValueError("collate makes batches for a task of your own; give a task too")
    if recipe.nesterov and recipe.optimizer in ("sgd", "muon") and recipe.momentum == 0:
        raise ValueError("nesterov needs momentum above zero; set nesterov to false or give a momentum")
    if recipe.warmup != "none" and recipe.warmup_epochs > recipe.epochs:
        raise ValueError(
            f"warmup_epochs {recipe.warmup_epochs} is longer than the run of {recipe.epochs} epochs;"
            " use fewer, or warmup none"
        )
    if recipe.pitfall == "momentum-inside-uncorrected" and not (recipe.optimizer == "sgd" and recipe.momentum):
        raise ValueError("pitfall momentum-inside-uncorrected needs optimizer sgd with momentum")
    if recipe.pitfall and recipe.pitfall.startswith("batchnorm") and recipe.batchnorm == "keep":
        raise ValueError(f"pitfall {recipe.pitfall} is for batchnorm ghost: a kept BatchNorm moves by its own rule")
    if recipe.pitfall and recipe.reduce == "canonical":
        raise ValueError("a pitfall is measured with reduce fast; leave reduce canonical out")
    if recipe.together > 1:
        _refuse_canonical_pass(recipe)
    if recipe.recalibrate is not None:
        _refuse_recalibrate(recipe)
    if recipe.ramp:
        _refuse_ramp(recipe)
    if recipe.scaling == "adascale":
        _refuse_adascale(recipe)


def _refuse_canonical_pass(recipe: Any) -> None:
    together = recipe.canonical_pass
    for stage, _ in recipe.stages:
        k = stage.workers.workers
        if k % together:
            raise ValueError(
                f"canonical_pass {together} must divide k = {k}, the workers of minibatch {stage.minibatch}"
            )
    alone = {"batchnorm keep": recipe.batchnorm == "keep", "scaling adascale": recipe.scaling == "adascale"}
    for one in (name for name, asked in alone.items() if asked):
        raise ValueError(f"{one} takes one worker a pass; leave canonical_pass {together} out")


def _refuse_ramp(recipe: Any) -> None:
    *_, (largest, last) = parse_ramp(recipe.ramp)
    for size, _ in parse_ramp(recipe.ramp):
        whole_workers("ramp's minibatch", size, per_worker=recipe.per_worker)
    if largest >= recipe.minibatch or last >= recipe.epochs:
        raise ValueError(
            f"ramp {','.join(recipe.ramp)} must end below minibatch {recipe.minibatch}, to which it grows, and before"
            f" epoch {recipe.epochs}"
        )
    if recipe.pitfall or recipe.continues:
        raise ValueError("a pitfall, and a run that goes on from another, have one minibatch; leave ramp out")
    if recipe.optimizer in ADAM and recipe.scaling == "sqrt" and recipe.scale_betas:
        raise ValueError(
            f"with a ramp {recipe.optimizer}'s averages would change their β in mid-run; set scale_betas to false, so"
            " that the rate alone follows the minibatch"
        )


def _refuse_adascale(recipe: Any) -> None:
    if recipe.optimizer != "sgd":
        raise ValueError(f"scaling adascale is derived for SGD's step; use optimizer sgd, not {recipe.optimizer}")
    others = ("ramp", "pitfall", "continues", "ema", "task")
    if given := [name for name in others if getattr(recipe, name)]:
        raise ValueError(f"scaling adascale, and how long it makes a run, are not defined with {', '.join(given)}")
    if recipe.minibatch < recipe.base_minibatch:
        raise ValueError(
            f"scaling adascale grows the rate from base_minibatch {recipe.base_minibatch} on; use a minibatch of at"
            f" least that, not {recipe.minibatch}"
        )
    if recipe.minibatch == recipe.per_worker > recipe.base_minibatch:
        raise ValueError("scaling adascale compares the gradients of two workers at least; use a smaller per_worker")


def _refuse_recalibrate(recipe: Any) -> None:
    if recipe.batchnorm == "keep":
        raise ValueError("recalibrate is for batchnorm ghost: a kept BatchNorm's statistics are up to its class")
    whole_workers("recalibrate", recipe.recalibrate, per_worker=recipe.per_worker, samples=recipe.samples)
    if (recipe.pitfall or "").startswith("batchnorm-"):
        raise ValueError(
            f"pitfall {recipe.pitfall} is measured on the running statistics, which recalibrate replaces; leave out"
            " one of the two"
        )

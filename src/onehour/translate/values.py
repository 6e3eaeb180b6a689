"""What the templates are filled with: the recipe, its samples, and who computes which part of a minibatch."""

from __future__ import annotations

import re
import shlex
from typing import Any

from onehour.config import Recipe
from onehour.planner import Plan

OPTIMIZERS = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad"}
OPTIMIZERS |= {"nadam": "NAdam", "radam": "RAdam"}
# Where timm's have other defaults than torch's.
TIMM_OPTIMIZERS = {"rmsprop": "rmsprop --momentum 0 --opt-kwargs alpha=0.99", "adagrad": "adagrad --opt-eps 1e-10"}
TIMM_MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def values_of(plan: Plan) -> dict[str, Any]:
    """By name. kn = p · passes · n; a process for each worker where the plan names no number of processes.

    Raises:
        ValueError: if the samples are unknown, the workers do not divide evenly, or no other tool has it.
    """
    recipe, workers, samples = plan.recipe, plan.recipe.workers.workers, plan.recipe.samples
    processes = plan["placement"].value if "placement" in plan.values else workers
    if samples is None:
        raise ValueError("a translation needs the number of training samples; give --samples N")
    if workers % processes:
        fits = [p for p in range(1, workers + 1) if workers % p == 0]
        below, above = max(p for p in fits if p < processes), min(p for p in fits if p > processes)
        raise ValueError(
            f"{workers} workers (k = kn / n) do not divide evenly among {processes} processes, and other tools"
            f" average over processes as if they did; use --processes {below} or {above}, or `onehour train`"
        )
    if recipe.optimizer == "muon":
        raise ValueError("optimizer muon is not translated; use --optimizer sgd, and put your tool's own in its place")
    if recipe.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer {recipe.optimizer} is your own, and what it takes is not known here; translate with"
            " --optimizer sgd, and put your own in its place"
        )
    for name in ("label_smoothing", "mixup", "cutmix"):
        if getattr(recipe, name):
            raise ValueError(f"{name} is not translated; leave it out here, and set it in your tool")
    if recipe.epochs % 1:
        raise ValueError(f"other tools count whole epochs, and epochs is {recipe.epochs:g}; give a whole number")
    if recipe.scaling == "adascale":
        raise ValueError("scaling adascale is not translated; use linear, sqrt or fixed")
    if recipe.precision == "float64":
        raise ValueError("precision float64 is not translated; use --precision float32 or bf16")
    for name in ("clip_norm", "ema", "freeze", "layer_rates", "ramp"):
        if getattr(recipe, name):
            raise ValueError(f"{name} is not translated; leave it out here, and set it in your tool")
    passes, schedule, n = workers // processes, schedule_code(recipe), recipe.per_worker
    nodes = processes // (each := max(g for g in range(1, 9) if processes % g == 0))  # at most the paper's 8 (§4)
    momentum = f", momentum={recipe.momentum!r}{', nesterov=True' * recipe.nesterov}" * (recipe.optimizer == "sgd")
    layout, compiles = "    model.to(memory_format=torch.channels_last)\n", "    model.compile()\n"
    return recipe.as_dict() | {
        "workers": workers,
        "processes": processes,
        "passes": passes,
        "together": n * passes,
        "weight_decay": recipe.target_weight_decay,
        "iterations": recipe.workers.iterations(samples, recipe.epochs),
        "once": max(1, round(samples / recipe.minibatch)),
        "nodes": nodes,
        "torchrun": f"torchrun{f' --nnodes {nodes}' * (nodes > 1)} --nproc-per-node {each}",
        "machines": f" --num_machines {nodes}" * (nodes > 1),
        "bf16": recipe.precision == "bf16",
        "schedule": schedule,
        "schedules": ", ".join(re.findall(r"\w+(?=\()", schedule)),
        "zero": "" if recipe.zero_gamma else ", zero_gamma=False",
        "speed": layout * recipe.channels_last + compiles * recipe.compile,
        "optim": f"{OPTIMIZERS[recipe.optimizer]}(groups, lr=SCHEDULE(0.0){momentum}{_adam(recipe)})",
        "timm_flags": " \\\n    ".join(_timm_flags(recipe)),
    }


def schedule_code(recipe: Recipe) -> str:
    """The recipe's schedule as it is written with onehour's rules; it gives the same rates to the bit.

    >>> from onehour.planner import plan
    >>> schedule_code(plan("resnet50", minibatch=8192).recipe)
    'gradual_warmup(step_decay(3.2, [30, 60, 80], factor=0.1), start_lr=0.1, epochs=5)'
    """
    if recipe.decay == "cosine":
        usual = f"cosine_decay({recipe.target_lr!r}, epochs={recipe.epochs})"
    else:
        drops = [int(milestone) if milestone.isdecimal() else milestone for milestone in recipe.milestones]
        usual = f"step_decay({recipe.target_lr!r}, {drops}, factor={recipe.decay_factor!r})"
    if not recipe.warms_up:
        return usual
    return f"{recipe.warmup}_warmup({usual}, start_lr={recipe.base_lr!r}, epochs={recipe.warmup_epochs})"


def _adam(recipe: Recipe) -> str:
    return "" if recipe.adam is None else f", betas={recipe.adam['betas']!r}, eps={recipe.adam['eps']!r}"


def _timm_flags(recipe: Recipe) -> list[str]:
    """Of train.py, a line each, where they depend on the recipe."""
    name = recipe.model.removeprefix("timm:")
    model = name if name in TIMM_MODELS or recipe.model.startswith("timm:") else "MODEL"
    optimizer = TIMM_OPTIMIZERS.get(recipe.optimizer, recipe.optimizer)
    if recipe.optimizer == "sgd":
        optimizer = f"{'sgd' if recipe.nesterov else 'momentum'} --momentum {recipe.momentum!r}"
    betas = ""
    if recipe.adam is not None:
        betas = f" --opt-betas {' '.join(map(repr, recipe.adam['betas']))} --opt-eps {recipe.adam['eps']!r}"
    classes = "" if recipe.classes is None else f" --num-classes {recipe.classes}"
    return [
        f"--data-dir DATA --model {shlex.quote(model)}{classes}",
        f"--opt {optimizer} --weight-decay {recipe.target_weight_decay!r}{betas} --lr {recipe.schedule(0.0)!r}",
        *["--train-interpolation bilinear --interpolation bilinear --crop-pct 0.875"] * (model != "MODEL"),
        *["--amp --amp-dtype bfloat16"] * (recipe.precision == "bf16"),
        *["--channels-last"] * recipe.channels_last,
        *["--torchcompile"] * recipe.compile,
        *["--model-kwargs zero_init_last=False"] * (not recipe.zero_gamma),
    ]

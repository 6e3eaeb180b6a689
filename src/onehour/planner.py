"""What follows from one dial: every derived value of a run, with its rule and the paper's section. No torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from onehour.config import Recipe
from onehour.dist.placement import place
from onehour.files import to_json
from onehour.recipes import recipe as named
from onehour.rules.schedule import parse_milestones

__all__ = ["Derived", "Plan", "plan", "tabulate"]


@dataclass(frozen=True)
class Derived:
    """A value, the rule it comes from and the paper's section, if it is the paper's; `base` is at the base minibatch.

    >>> Derived(3.2, "0.1 · 8192/256", "2.1").value
    3.2
    """

    value: Any
    rule: str
    section: str
    base: Any = None


@dataclass(frozen=True)
class Plan:
    """The derived values of a recipe by name, in reading order.

    >>> plan("resnet50", minibatch=8192)["target_lr"].value
    3.2
    """

    recipe: Recipe
    values: dict[str, Derived] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Derived:
        return self.values[name]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The values as plain data: {"target_lr": {"value": …, "rule": …, "section": …, "base": …}, …}.

        >>> plan("digits").as_dict()["workers"]["value"]
        2
        """
        return {name: dict(vars(derived)) for name, derived in self.values.items()}

    def to_json(self) -> str:
        """`as_dict` as JSON.

        >>> plan("digits").to_json()[0]
        '{'
        """
        return to_json(self.as_dict(), indent=2)


def plan(
    recipe: Recipe | str,
    *,
    processes: int | None = None,
    images_per_second: float | None = None,
    **changes: Any,
) -> Plan:
    """Everything a run derives from its recipe, before anything runs.

    Args:
        recipe: a `Recipe`, a recipe's name or a .toml file.
        processes: p, to place the k workers on.
        images_per_second: of the whole run; adds the hours it would take.
        changes: any field of `Recipe`, for example minibatch=8192.

    Raises:
        ValueError: if the recipe cannot be, or p > k.

    >>> plan("resnet50", minibatch=8192)["iterations"].value
    14076
    """
    recipe = named(recipe, **changes) if isinstance(recipe, str) else recipe.replace(**changes)
    base = recipe.replace(minibatch=recipe.base_minibatch) if _has_base(recipe) else recipe
    values = dict(_derive(recipe, base))
    if recipe.samples is not None:
        values |= dict(_derive_from_samples(recipe, base, recipe.samples))
        if images_per_second is not None:
            values["hours"] = _hours(recipe, recipe.samples, images_per_second)
    elif images_per_second is not None:
        raise ValueError("hours need the number of training samples; give samples")
    if processes is not None:
        values["placement"] = _placement(recipe.workers.workers, processes)
    return Plan(recipe, values)


def tabulate(plans: list[Plan]) -> str:
    """One plan as lines of value, base value, rule and section; several as the paper's table, a row a minibatch.

    >>> print(tabulate([plan("resnet50", minibatch=size) for size in (256, 8192)]))
    minibatch  workers  target_lr  warmup_epochs  iterations
    256        8        0.1        0              450411
    8192       256      3.2        5              14076
    """
    if len(plans) == 1:
        recipe = plans[0].recipe
        head = [("value", f"at {recipe.minibatch}", f"at {recipe.base_minibatch}", "rule", "section")]
        rows = [
            (
                name,
                _shown(d.value),
                "" if d.base is None else _shown(d.base),
                d.rule,
                f"§{d.section}" if d.section else "",
            )
            for name, d in plans[0].values.items()
        ]
    else:
        columns = ["minibatch", "workers", "target_lr", "warmup_epochs", "iterations", "hours"]
        columns = [column for column in columns if column in plans[0].values]
        head = [tuple(columns)]
        rows = [tuple(_shown(p[column].value) for column in columns) for p in plans]
    table = head + rows
    widths = [max(_width(row[i]) for row in table) for i in range(len(table[0]))]
    padded = ("  ".join(cell + " " * (w - _width(cell)) for cell, w in zip(row, widths, strict=True)) for row in table)
    return "\n".join(line.rstrip() for line in padded)


def _width(cell: str) -> int:
    """Columns on a terminal: the hat of η̂ takes none of its own."""
    return sum(not unicodedata.combining(character) for character in cell)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _has_base(recipe: Recipe) -> bool:
    fits = recipe.samples is None or recipe.base_minibatch <= recipe.samples
    return fits and recipe.base_minibatch % recipe.per_worker == 0


def _derive(recipe: Recipe, base: Recipe) -> Iterable[tuple[str, Derived]]:
    kn, n, k = recipe.minibatch, recipe.per_worker, recipe.workers.workers
    yield "minibatch", Derived(kn, "kn, the one dial", "2.1", base.minibatch)
    kept = "; the network's own BatchNorm sees it, one worker a pass" if recipe.batchnorm == "keep" else ""
    yield "per_worker", Derived(n, f"n stays: BatchNorm makes it part of the loss{kept}", "2.3", base.per_worker)
    yield "workers", Derived(k, f"k = kn / n = {kn} / {n}", "2.3", base.workers.workers)
    yield "base_lr", Derived(recipe.base_lr, "η, the recipe's own", "5.1", base.base_lr)
    yield "base_minibatch", Derived(recipe.base_minibatch, "where η is right", "5.1", base.base_minibatch)
    b = recipe.base_minibatch
    rule = {"linear": f"η · kn/{b}", "sqrt": f"η · √(kn/{b})", "fixed": "η, whatever kn"}[recipe.scaling]
    yield "target_lr", Derived(recipe.target_lr, f"η̂ = {rule}", "2.1", base.target_lr)
    for pattern, factor in recipe.rate_factors.items():
        rates = (r.target_lr * factor for r in (recipe, base))
        yield f"target_lr of {pattern}", Derived(next(rates), f"{factor:g} · η̂, at every iteration", "", next(rates))
    yield from _derive_adam(recipe, base)
    yield from _derive_others(recipe, base)
    if recipe.warms_up:
        text = {
            "gradual": "η + (η̂ − η)·t/T, added at every iteration",
            "constant": "η for all of it, then a jump to η̂",
        }[recipe.warmup]
    else:
        text = "none: the rate does not grow" if recipe.warmup != "none" else "none"
    yield "warmup_start_lr", Derived(recipe.schedule(0.0), text, "2.2", base.schedule(0.0))
    epochs = recipe.warmup_epochs if recipe.warms_up else 0
    yield (
        "warmup_epochs",
        Derived(epochs, "counted inside the run's epochs", "2.2", base.warmup_epochs if base.warms_up else 0),
    )
    yield "epochs", Derived(recipe.epochs, "the same for every minibatch", "5.1", base.epochs)
    if recipe.decay == "step":
        for milestone in parse_milestones(recipe.milestones):
            if milestone < recipe.epochs:
                rates = (float(r.schedule(float(milestone))) for r in (recipe, base))
                yield (
                    f"lr_at_epoch_{milestone}",
                    Derived(next(rates), f"× {recipe.decay_factor}", "5.1", next(rates)),
                )


def _derive_adam(recipe: Recipe, base: Recipe) -> Iterable[tuple[str, Derived]]:
    """What Adam's kind of optimizer takes beside the rate."""
    if recipe.adam is None or base.adam is None:
        return
    follows = recipe.scaling == "sqrt" and recipe.scale_betas
    rules = {
        "beta1": "1 − κ·(1 − β₁), κ = kn / base (Malladi et al. 2022)",
        "beta2": "1 − κ·(1 − β₂) (Malladi et al. 2022)",
        "epsilon": "ε / √κ (Malladi et al. 2022)",
        "weight_decay": "λ·√κ, decoupled (Wang & Aitchison 2024)",
    }
    if recipe.optimizer != "adamw":
        rules["weight_decay"] = "λ, coupled: part of the loss"
    for (name, rule), now, then in zip(rules.items(), _adam_values(recipe), _adam_values(base), strict=True):
        yield name, Derived(now, rule if follows else "the recipe's own", "", then)


def _derive_others(recipe: Recipe, base: Recipe) -> Iterable[tuple[str, Derived]]:
    """What else a recipe may ask for beyond the paper's."""
    if recipe.clip_norm is not None:
        yield "clip_norm", Derived(recipe.clip_norm, "of the mean over kn: it stays", "", base.clip_norm)
    if recipe.ema is not None:
        yield "ema", Derived(recipe.target_ema, "ρ^κ, κ = kn / base (Busbridge et al. 2023)", "", base.target_ema)
    if recipe.freeze:
        named = ", ".join(recipe.freeze)
        yield "freeze", Derived(named, "these do not train; a run says how many of how many", "", named)


def _adam_values(recipe: Recipe) -> tuple[float, ...]:
    assert recipe.adam is not None
    return (*recipe.adam["betas"], recipe.adam["eps"], recipe.adam["weight_decay"])


def _derive_from_samples(recipe: Recipe, base: Recipe, samples: int) -> Iterable[tuple[str, Derived]]:
    kn, epochs, size = recipe.minibatch, recipe.epochs, recipe.workers
    yield "samples", Derived(samples, "N, training samples", "5.1", samples)
    yield (
        "iterations_per_epoch",
        Derived(
            size.iterations_per_epoch(samples),
            f"N / kn = {samples} / {kn}",
            "2.1",
            base.workers.iterations_per_epoch(samples),
        ),
    )
    yield (
        "iterations",
        Derived(
            size.iterations(samples, epochs),
            f"⌈{epochs} · N / kn⌉: full minibatches, nothing dropped",
            "3",
            base.workers.iterations(samples, epochs),
        ),
    )
    if recipe.warms_up:
        iterations = recipe.warmup_epochs * samples / kn
        yield "warmup_iterations", Derived(iterations, "T = warmup epochs · N / kn", "2.2", 0)
        if recipe.warmup == "gradual":
            step = (recipe.target_lr - recipe.base_lr) / iterations
            yield "warmup_lr_step", Derived(step, "(η̂ − η) / T, at every iteration", "2.2", 0.0)
    needed = epochs * samples / 3600
    yield "images_per_second_for_one_hour", Derived(needed, f"{epochs} · N / 3600 s", "5.5", needed)


def _hours(recipe: Recipe, samples: int, images_per_second: float) -> Derived:
    if not images_per_second > 0:
        raise ValueError(f"images_per_second must be above zero, got {images_per_second}")
    hours = recipe.epochs * samples / images_per_second / 3600
    return Derived(hours, f"{recipe.epochs} · N / {images_per_second:g} images/s", "5.5", hours)


def _placement(workers: int, processes: int) -> Derived:
    shares = [len(share) for share in place(workers, processes)]
    few, many = min(shares), max(shares)
    each = f"{few}" if few == many else f"{few} or {many}"
    return Derived(processes, f"{workers} workers on {processes} processes: {each} each", "2.3")

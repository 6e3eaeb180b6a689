"""What follows from one dial: every derived value of a run, with its rule and the paper's section. No torch."""

from __future__ import annotations

import math
import statistics
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from onehour.config import Recipe
from onehour.dist.cost import Links, Measured, expected_iteration
from onehour.dist.placement import place, place_by_halving
from onehour.files import to_json
from onehour.recipes import recipe as named
from onehour.rules.arguments import not_negative, positive, positive_int
from onehour.rules.schedule import parse_milestones

__all__ = ["plan"]

DECIDES_SPEED = ("model", "per_worker", "precision", "channels_last", "compile", "reduce")
"""Fields that a run must share with a recipe to say how long it takes."""
IF_CANONICAL = ("canonical_pass", "canonical_threads")
"""Those that a canonical run must share too."""
TIMES = ("image_seconds", "slowest", "reduction_seconds", "iteration_seconds", "hours", "efficiency", "price")


@dataclass(frozen=True)
class Derived:
    """A value, its rule, the paper's section if it is the paper's, and what it is at the base minibatch."""

    value: Any
    rule: str
    section: str
    base: Any = None


@dataclass(frozen=True)
class Plan:
    """The derived values of a recipe by name, in reading order."""

    recipe: Recipe
    values: dict[str, Derived] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Derived:
        return self.values[name]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The values as plain data: {"target_lr": {"value": …, "rule": …, "section": …, "base": …}, …}."""
        return {name: dict(vars(derived)) for name, derived in self.values.items()}

    def to_json(self) -> str:
        return to_json(self.as_dict(), indent=2)


def plan(
    recipe: Recipe | str | Path,
    *,
    processes: int | None = None,
    images_per_second: float | None = None,
    run: str | Path | None = None,
    bandwidth: float | None = None,
    latency: float = 50,
    spread: float | None = None,
    price: float | None = None,
    holds_to: tuple[float, float] | None = None,
    **changes: Any,
) -> Plan:
    """Everything a run derives from its recipe, before anything runs.

    Args:
        recipe: a `Recipe`, a recipe's name or a .toml file.
        processes: p, to place the k workers on.
        images_per_second: of the whole run; adds the hours it would take.
        run: a run's folder in its place: hours as it measured them on as many processes, modelled on others.
        bandwidth: Gbit/s of each process's link, each way; for a number of processes that the run did not have.
        latency: µs from one process to the next.
        spread: σ of a process's iterations, as a share of their mean; None takes the run's.
        price: of an hour of one process.
        holds_to: the interval in which the largest minibatch lies to which the rule holds; adds the largest k.
        changes: any field of `Recipe`, for example minibatch=8192.

    Raises:
        ValueError: if the recipe cannot be, p > k, or hours cannot be said.

    >>> plan("resnet50", minibatch=8192)["iterations"].value
    14076
    """
    recipe = named(recipe, **changes) if isinstance(recipe, str | Path) else recipe.replace(**changes)
    base = recipe
    if recipe.base_minibatch % recipe.per_worker == 0 and recipe.base_minibatch <= (recipe.samples or math.inf):
        base = recipe.replace(minibatch=recipe.base_minibatch, ramp=(), canonical_pass=1)
    if recipe.scaling == "adascale" and (run is not None or images_per_second is not None):
        raise ValueError("how many iterations scaling adascale takes is known when they are over: no hours can be said")
    if run is not None and recipe.ramp:
        raise ValueError("hours from a run are those of one minibatch; leave ramp out, or give images per second")
    if run is not None and images_per_second is not None:
        raise ValueError("give images per second or a run, not both")
    if run is None and (bandwidth is not None or spread is not None or latency != 50):
        raise ValueError(
            "bandwidth, latency and spread are for a run's hours on other processes; give a run, or leave them out"
        )
    latency = not_negative("latency", latency)
    measured, images = (None, 0) if run is None else _measured(Path(run), recipe, processes)
    values = dict(_derive(recipe, base))
    if recipe.samples is not None:
        values |= dict(_derive_from_samples(recipe, base, recipe.samples))
        if images_per_second is not None:
            values["hours"] = _hours(recipe, recipe.samples, images_per_second)
    elif images_per_second is not None or measured is not None:
        raise ValueError("hours need the number of training samples; give samples")
    if measured is not None and processes is None:
        processes = measured.processes
    if processes is not None:
        place(recipe.fewest_workers, processes, together=recipe.together)
        values["placement"] = _placement(recipe, processes)
    if measured is not None and processes is not None:
        links = None
        if bandwidth is not None:
            links = Links(1e9 * positive("bandwidth", bandwidth), 1e-6 * latency)
        values |= dict(_derive_time(recipe, measured, processes, images, links, spread))
    if price is not None:
        if "hours" not in values or processes is None:
            raise ValueError("a price needs hours and processes: give a run, or images per second and processes")
        cost = values["hours"].value * processes * positive("price", price)
        values["price"] = Derived(cost, f"hours · p · {price:g}", "")
    if holds_to is not None:
        values["largest_workers"] = _largest_workers(recipe.per_worker, *holds_to)
    return Plan(recipe, values)


def tabulate(plans: list[Plan]) -> str:
    """One plan as lines of value, base value, rule and section; several as the paper's table, a row each.

    Below that table stands how its hours were found.

    >>> print(tabulate([plan("resnet50", minibatch=size) for size in (256, 8192)]))
    minibatch  workers  target_lr  warmup_epochs  iterations
    256        8        0.1        0              450411
    8192       256      3.2        5              14076
    """
    if len(plans) == 1:
        recipe = plans[0].recipe
        below = []
        head = [("value", f"at {recipe.minibatch}", f"at {recipe.base_minibatch}", "rule", "section")]
        rows = [
            (name, _shown(d.value), "" if d.base is None else _shown(d.base), d.rule, f"§{d.section}" * bool(d.section))
            for name, d in plans[0].values.items()
        ]
    else:
        columns = ("minibatch", "workers", "target_lr", "warmup_epochs", "iterations", "placement")
        columns = [c for c in (*columns, "hours", "efficiency", "price", "largest_workers") if c in plans[0].values]
        head = [tuple("processes" if column == "placement" else column for column in columns)]
        rows = [tuple(_shown(p[column].value) for column in columns) for p in plans]
        found = [(name, p[name].rule) for name in TIMES for p in plans if name in p.values]
        below = [f"{name}: {rule}" for name, rule in dict.fromkeys(found)]
    table = head + rows
    widths = [max(_width(row[i]) for row in table) for i in range(len(table[0]))]
    padded = ("  ".join(cell + " " * (w - _width(cell)) for cell, w in zip(row, widths, strict=True)) for row in table)
    return "\n".join([*(line.rstrip() for line in padded), *below])


def _width(cell: str) -> int:
    """Columns on a terminal: the hat of η̂ takes none of its own."""
    return sum(not unicodedata.combining(character) for character in cell)


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _derive(recipe: Recipe, base: Recipe) -> Iterable[tuple[str, Derived]]:
    kn, n, k = recipe.minibatch, recipe.per_worker, recipe.workers.workers
    yield "minibatch", Derived(kn, "kn, the one dial", "2.1", base.minibatch)
    kept = "; the network's own BatchNorm sees it, one worker a pass" if recipe.batchnorm == "keep" else ""
    yield "per_worker", Derived(n, f"n stays: BatchNorm makes it part of the loss{kept}", "2.3", base.per_worker)
    yield "workers", Derived(k, f"k = kn / n = {kn} / {n}", "2.3", base.workers.workers)
    yield "base_lr", Derived(recipe.base_lr, "η, the recipe's own", "5.1", base.base_lr)
    yield "base_minibatch", Derived(recipe.base_minibatch, "where η is right", "5.1", base.base_minibatch)
    b = recipe.base_minibatch
    rule = {
        "linear": f"η · kn/{b}",
        "sqrt": f"η · √(kn/{b})",
        "fixed": "η, whatever kn",
        "adascale": f"η; an iteration's rate is r times as much, 1 ≤ r ≤ kn/{b} by gradients (Johnson et al. 2020)",
    }[recipe.scaling]
    yield "target_lr", Derived(recipe.target_lr, f"η̂ = {rule}", "2.1", base.target_lr)
    for stage, until in recipe.stages[:-1]:
        then = "then k grows and n stays (Smith et al. 2018)"
        rule = f"ramp: k = {stage.workers.workers}, η̂ = {stage.target_lr:g}; {then}"
        yield f"minibatch_until_epoch_{until}", Derived(stage.minibatch, rule, "")
    for pattern, factor in recipe.rate_factors.items():
        rates = (r.target_lr * factor for r in (recipe, base))
        yield f"target_lr of {pattern}", Derived(next(rates), f"{factor:g} · η̂, at every iteration", "", next(rates))
    yield from _derive_adam(recipe, base)
    yield from _derive_others(recipe, base)
    texts = {
        "gradual": "η + (η̂ − η)·t/T, added at every iteration",
        "constant": "η for all of it, then a jump to η̂",
        "none": "none",
    }
    text = texts[recipe.warmup] if recipe.warms_up or recipe.warmup == "none" else "none: the rate does not grow"
    yield "warmup_start_lr", Derived(recipe.schedule(0.0), text, "2.2", base.schedule(0.0))
    epochs = (each.warmup_epochs if each.warms_up else 0 for each in (recipe, base))
    yield "warmup_epochs", Derived(next(epochs), "counted inside the run's epochs", "2.2", next(epochs))
    adascale = recipe.scaling == "adascale"
    rule = "of the base's schedule: the run ends by Σ r" if adascale else "the same for every minibatch"
    yield "epochs", Derived(recipe.epochs, rule, "5.1", base.epochs)
    if recipe.decay == "step":
        for milestone in parse_milestones(recipe.milestones):
            if milestone < recipe.epochs:
                rates = (float(r.schedule(float(milestone))) for r in (recipe, base))
                name = f"lr_at_epoch_{milestone}"
                yield name, Derived(next(rates), f"× {recipe.decay_factor}", "5.1", next(rates))


def _derive_adam(recipe: Recipe, base: Recipe) -> Iterable[tuple[str, Derived]]:
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
    now, then = ((*adam["betas"], adam["eps"], adam["weight_decay"]) for adam in (recipe.adam, base.adam))
    for (name, rule), value, at_base in zip(rules.items(), now, then, strict=True):
        yield name, Derived(value, rule if follows else "the recipe's own", "", at_base)


def _derive_others(recipe: Recipe, base: Recipe) -> Iterable[tuple[str, Derived]]:
    if recipe.optimizer == "muon":
        rule = "a step of singular values near 1, × √max(1, rows/columns), whatever kn"
        yield "orthogonal", Derived("hidden weights", f"{rule}; the rest by SGD at the same rate", "", "hidden weights")
    if recipe.clip_norm is not None:
        yield "clip_norm", Derived(recipe.clip_norm, "of the mean over kn: it stays", "", base.clip_norm)
    if recipe.ema is not None:
        yield "ema", Derived(recipe.target_ema, "ρ^κ, κ = kn / base (Busbridge et al. 2023)", "", base.target_ema)
    if recipe.freeze:
        named = ", ".join(recipe.freeze)
        yield "freeze", Derived(named, "these do not train; a run says how many of how many", "", named)


def _derive_from_samples(recipe: Recipe, base: Recipe, samples: int) -> Iterable[tuple[str, Derived]]:
    kn, epochs, ramp = recipe.minibatch, recipe.epochs, recipe.phases(samples)
    iterations, each = ramp.iterations(samples, epochs), f"⌈{epochs:g} · N / kn⌉"
    if recipe.scaling == "adascale":
        most = base.workers.iterations(samples, epochs)
        each, iterations = f"at most, where every r is 1; at least {each} = {iterations}", most
    if recipe.ramp:
        firsts = [phase.first for phase in ramp.phases] + [iterations]
        counts = zip(pairwise(firsts), ramp.phases, strict=True)
        each = " + ".join(f"{stop - start} of {phase.minibatch.size}" for (start, stop), phase in counts)
    yield "samples", Derived(samples, "N, training samples", "5.1", samples)
    per_epoch = (workers.iterations_per_epoch(samples) for workers in (recipe.workers, base.workers))
    yield "iterations_per_epoch", Derived(next(per_epoch), f"N / kn = {samples} / {kn}", "2.1", next(per_epoch))
    rule = f"{each}: full minibatches, nothing dropped"
    yield "iterations", Derived(iterations, rule, "3", base.workers.iterations(samples, epochs))
    if recipe.warms_up and not recipe.ramp:
        iterations = recipe.warmup_epochs * samples / kn
        yield "warmup_iterations", Derived(iterations, "T = warmup epochs · N / kn", "2.2", 0)
        if recipe.warmup == "gradual":
            end = recipe.schedule(recipe.warmup_epochs)
            top = "η̂" if end == recipe.target_lr else f"{end:g}"  # the decay may have begun by then
            step = (end - recipe.base_lr) / iterations
            yield "warmup_lr_step", Derived(step, f"({top} − η) / T, at every iteration", "2.2", 0.0)
    if recipe.scaling == "adascale":
        return
    needed = epochs * samples / 3600
    yield "images_per_second_for_one_hour", Derived(needed, f"{epochs:g} · N / 3600 s", "5.5", needed)


def _hours(recipe: Recipe, samples: int, images_per_second: float) -> Derived:
    hours = recipe.epochs * samples / positive("images_per_second", images_per_second) / 3600
    return Derived(hours, f"{recipe.epochs:g} · N / {images_per_second:g} images/s", "5.5", hours)


def _shares(recipe: Recipe, processes: int) -> list[int]:
    """How many workers each process hosts."""
    division = place_by_halving if recipe.reduce == "canonical" else place
    return [len(share) for share in division(recipe.workers.workers, processes, together=recipe.together)]


def _placement(recipe: Recipe, processes: int) -> Derived:
    *fewer, most = sorted(set(_shares(recipe, processes)))
    each = f"{', '.join(map(str, fewer))} or {most}" if fewer else f"{most}"
    return Derived(processes, f"{recipe.workers.workers} workers on {processes} processes: {each} each", "2.3")


def _measured(folder: Path, recipe: Recipe, processes: int | None) -> tuple[Measured, int]:
    """What a run measured, and the images of the process that an iteration on so many processes is timed by.

    That is the one with the most, but at the run's own minibatch and processes it is process 0, which has been timed:
    what it waits for those with more workers is in its reduction.
    """
    from onehour.training.record import Run  # needs torch

    run = Run(folder)
    names = DECIDES_SPEED + IF_CANONICAL * (recipe.reduce == "canonical")
    pairs = {name: (getattr(run.recipe, name), getattr(recipe, name)) for name in names}
    if changed := [f"{name}: {own} → {asked}" for name, (own, asked) in pairs.items() if own != asked]:
        raise ValueError(f"{folder} does not tell how fast this recipe is ({'; '.join(changed)}); give a run like it")
    steps = [step for line in run.timing for step in line.get("steps_ms", [])]
    if not (steps and run.summary.get("images_per_second") and run.summary.get("parameter_bytes")):
        raise ValueError(f"{folder} has no images_per_second yet: it has no summary.json")
    if (seeds := run.summary.get("seeds_together", 1)) > 1:
        raise ValueError(f"{folder} was timed as one of {seeds} seeds in one network; give a run alone")
    own = positive_int("processes", run.environment.get("processes", 1))
    together = positive_int("workers_per_pass", run.environment.get("workers_per_pass", 1))
    shares, asked = _shares(run.recipe, own), _shares(recipe, own if processes is None else processes)
    computing = [1e-3 * (data + compute) for data, compute, _, _ in steps]
    mean, reduction = statistics.fmean(computing), 1e-3 * statistics.fmean(step[2] for step in steps)
    whole = sum(line.get("seconds", 0.0) for line in run.timing) / len(steps)
    image, n = mean / (shares[0] * recipe.per_worker), recipe.per_worker
    fixed = max(0.0, whole - mean - reduction)
    images = n * max(asked)
    if (processes in (None, own)) and recipe.minibatch == run.recipe.minibatch:
        images = n * shares[0]
    else:
        reduction = max(0.0, reduction - n * (max(shares) - shares[0]) * image)
    measured = Measured(
        processes=own,
        image=image,
        fixed=fixed,
        reduction=reduction,
        spread=_spread(computing),
        gradient_bytes=run.summary["parameter_bytes"] + run.summary.get("buffer_bytes", 0),
        pass_images=min(shares[0], together) * n,
    )
    return measured, images


def _spread(seconds: list[float]) -> float:
    """σ as a share of the mean, by the middle 68 % of them: a first iteration or a save says nothing of the others."""
    if len(seconds) < 2:
        return 0.0
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return (cuts[83] - cuts[15]) / 2 / statistics.fmean(seconds)


def _derive_time(
    recipe: Recipe, measured: Measured, processes: int, images: int, links: Links | None, spread: float | None
) -> Iterable[tuple[str, Derived]]:
    modelled = processes not in (1, measured.processes)
    if modelled and links is None:
        raise ValueError(
            f"the run had {measured.processes} process{'es' * (measured.processes > 1)}: what the reduction costs on"
            f" {processes} depends on the network; give bandwidth, Gbit/s of each process's link"
        )
    if modelled and recipe.reduce == "canonical":
        raise ValueError(f"what reduce canonical costs on {processes} processes is not modelled; plan with reduce fast")
    sigma = measured.spread if spread is None else not_negative("spread", spread)
    time, alone = (
        expected_iteration(measured, images=share, processes=p, links=links, spread=sigma)
        for share, p in ((images, processes), (recipe.minibatch, 1))
    )
    rule = "of the run: data, forward and backward of an image on one process, taken to be the same on any number"
    yield "image_seconds", Derived(measured.image, rule, "")
    if modelled and links is not None:
        source = "given" if spread is not None else "the middle 68 % of the run's iterations"
        rule = f"1 + σ·E[max of p normals], σ = {sigma:.3g} of an iteration ({source})"
        yield "slowest", Derived(time.slowest, rule, "5.5")
        rule = (
            f"2·(p − 1)/p · {measured.gradient_bytes / 1e6:.3g} MB at {links.bandwidth / 1e9:g} Gbit/s and 2·(p − 1)"
            f" times {1e6 * links.latency:g} µs; buckets of 25 MiB but the last behind backward, 2/3 of computing"
        )
        yield "reduction_seconds", Derived(time.reduction, rule, "4")
    else:
        rule = "of the run: waiting for the reduction" if processes > 1 else "none: one process"
        yield "reduction_seconds", Derived(time.reduction, rule, "4")
    rule = f"image · images of a process · slowest + reduction + {time.fixed:.3g} s of the run's for the update"
    yield "iteration_seconds", Derived(time.seconds, rule, "5.5")
    assert recipe.samples is not None
    hours = recipe.workers.iterations(recipe.samples, recipe.epochs) * time.seconds / 3600
    yield "hours", Derived(hours, "iterations · iteration_seconds / 3600, without evaluating and saving", "5.5")
    yield "efficiency", Derived(alone.seconds / processes / time.seconds, "time on one process / p / time on p", "5.5")


def _largest_workers(per_worker: int, low: float, high: float) -> Derived:
    if not 0 < low <= high < math.inf:
        raise ValueError(f"holds_to is {low:g} to {high:g}; expected a smaller and a larger minibatch")
    least, most = max(1, int(low // per_worker)), int(high // per_worker)
    if most < 1:
        raise ValueError(
            f"holds_to ends at {high:g}, below the {per_worker} images of one worker; use larger minibatches"
        )
    rule = f"kn ≤ B, which lies between {low:g} and {high:g}: from {least} workers on it may break"
    return Derived(most, rule, "")

"""What a sweep consists of: a recipe, minibatches, seeds and arms; its cells follow (paper F1, T1, T2a)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from onehour.config import PITFALLS, SIZES, Recipe
from onehour.files import opened, replace_whole
from onehour.rules.arguments import positive_int
from onehour.rules.minibatch import parse_size
from onehour.sidefile import Read, read_toml

SPEC = "sweep.toml"
Arm = tuple[tuple[str, str], ...]  # (field, value) of what is changed in a recipe; () for the recipe itself

NOT_ARMS = ("name", "minibatch", "seed", "samples", "classes", "model", "data", "task", "validation", "epochs")
"""What an arm cannot change: the axes, and the task, without which errors cannot be compared."""

FACTORS = (1, 2, 4, 8, 16, 32, 64)  # times the base minibatch: the paper's 256 … 16k
ARMS_AT = 16  # times the base minibatch, at which arms are trained


def label_of(arm: Arm) -> str:
    """An arm as it is written on the command line."""
    return ",".join(f"{name}={value}" for name, value in arm)


def arm_of(recipe: Recipe, base: Recipe) -> Arm:
    """What a recipe changes of another, beside its minibatch, its seed and what names or describes the task."""
    pairs = [(f.name, getattr(recipe, f.name), getattr(base, f.name)) for f in fields(Recipe)]
    return tuple((name, _text(own)) for name, own, other in pairs if name not in NOT_ARMS and own != other)


def applied(recipe: Recipe, arm: Arm, minibatch: int, seed: int) -> Recipe:
    changes: dict[str, Any] = {name: _value(name, value) for name, value in arm}
    try:
        return recipe.replace(**({"minibatch": minibatch, "seed": seed} | changes))
    except ValueError as error:
        raise ValueError(f"minibatch {minibatch}{' with ' + label_of(arm) if arm else ''}: {error}") from error


def parse_arm(text: str) -> list[Arm]:
    """The arms of FIELD=VALUE,VALUE…: one for each value."""
    name, equals, values = text.partition("=")
    name = name.replace("-", "_")
    if not equals or not all(values.split(",")):
        raise ValueError(f"--arm is {text!r}; expected FIELD=VALUE[,VALUE…], for example warmup=none,constant")
    if name in NOT_ARMS:
        raise ValueError(f"--arm cannot change {name}: an arm is one thing changed in the recipe, at the same task")
    return [((name, _text(_value(name, value))),) for value in values.split(",")]


def table_arms(recipe: Recipe, minibatches: Sequence[int] = ()) -> list[Arm]:
    """The paper's T1 and T2a: warmups, scalings and rates other than the recipe's.

    Args:
        minibatches: where they are trained; scalings that the recipe's optimizer does not allow there are left out.
    """
    arms = [(("warmup", kind),) for kind in ("none", "constant", "gradual") if kind != recipe.warmup]
    for kind in ("fixed", "sqrt", "linear"):
        arm = (("scaling", kind),)
        if kind != recipe.scaling and all(_allowed(recipe, arm, minibatch) for minibatch in minibatches):
            arms.append(arm)
    return arms + [(("base_lr", _text(recipe.base_lr * factor)),) for factor in (0.5, 2.0)]


def _allowed(recipe: Recipe, arm: Arm, minibatch: int) -> bool:
    """False where it is the arm that cannot be; a minibatch that the recipe itself cannot have is refused."""
    applied(recipe, (), minibatch, 0)
    try:
        applied(recipe, arm, minibatch, 0)
    except ValueError:
        return False
    return True


def pitfall_arms(recipe: Recipe, minibatch: int) -> list[Arm]:
    """Each thing that training loops get wrong, one an arm: the broken rules, BatchNorm over all of kn, no zero γ."""
    sgd = recipe.optimizer == "sgd" and recipe.momentum > 0
    names = [name for name in PITFALLS if sgd or name != "momentum-inside-uncorrected"]
    arms: list[Arm] = [(("pitfall", name),) for name in names]
    return [*arms, (("per_worker", str(minibatch)),), (("zero_gamma", _text(not recipe.zero_gamma)),)]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    arm: Arm
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its folder under `cells`."""
        arm = "".join(c if c.isalnum() or c in "=.,-_" else "_" for c in label_of(self.arm))
        return f"{arm}-{self.recipe.minibatch}-s{self.recipe.seed}".removeprefix("-")


@dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A recipe over minibatches and seeds, and arms at some of the minibatches."""

    recipe: Recipe  # completed (samples and classes are known); its own minibatch and seed do not matter
    minibatches: tuple[int, ...]
    seeds: tuple[int, ...]
    reference_seeds: tuple[int, ...] = ()  # of the reference's cell beside these: it is one side of every comparison
    arms: tuple[Arm, ...] = ()
    arms_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("minibatches", "seeds", "reference_seeds", "arms", "arms_at"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds a value twice: {', '.join(map(str, values))}")
        if not self.minibatches or not self.seeds:
            raise ValueError("a sweep needs at least one minibatch and one seed")
        if bool(self.arms) != bool(self.arms_at):
            raise ValueError("arms and arms_at belong together: name the minibatch that the arms are trained at")
        for arm in self.arms:
            if not arm_of(applied(self.recipe, arm, self.arms_at[0], 0), self.recipe):
                raise ValueError(f"arm {label_of(arm)} already is the recipe's value; leave it out")
        list(self.cells())  # every recipe is checked when it is built

    def cells(self) -> Iterator[Cell]:
        """Every run, the recipe's own first."""
        rows: list[tuple[Arm, int]] = [((), minibatch) for minibatch in self.minibatches]
        rows += [(arm, minibatch) for minibatch in self.arms_at for arm in self.arms]
        base = self.recipe.base_minibatch
        reference = base if base in self.minibatches else min(self.minibatches)
        for arm, minibatch in rows:
            more = self.reference_seeds if (arm, minibatch) == ((), reference) else ()
            for seed in dict.fromkeys((*self.seeds, *more)):
                yield Cell(arm, applied(self.recipe, arm, minibatch, seed))

    def to_toml(self) -> str:
        arms = [label_of(arm) for arm in self.arms]
        axes = {"minibatches": self.minibatches, "seeds": self.seeds, "reference_seeds": self.reference_seeds}
        axes |= {"arms": arms, "arms_at": self.arms_at}
        lines = [f"{name} = {json.dumps(values, ensure_ascii=False)}" for name, values in axes.items()]
        return "\n".join(lines) + "\n\n[recipe]\n" + self.recipe.to_toml()

    @classmethod
    def read(cls, folder: Path) -> SweepSpec:
        """The spec in a sweep's folder."""
        path = folder / SPEC
        values = read_toml(path)
        try:
            return cls(
                recipe=Recipe.from_dict(Read.every(values["recipe"], path)),
                minibatches=tuple(values["minibatches"]),
                seeds=tuple(values["seeds"]),
                reference_seeds=tuple(values.get("reference_seeds", ())),
                arms=tuple(_arm_from(text, path) for text in values["arms"]),
                arms_at=tuple(values["arms_at"]),
            )
        except KeyError as error:
            raise ValueError(f"{path} has no {error.args[0]}; it was written by a sweep: do not edit it") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def write(self, folder: Path) -> None:
        """Write sweep.toml, whole or not at all."""
        with opened(folder, make=True) as held:
            replace_whole(held, SPEC, self.to_toml())


def spec_of(
    recipe: Recipe,
    sizes: Sequence[int] | None,
    seeds: range,
    arms: Sequence[str] | str | None,
    arms_at: Sequence[int] | None,
    reference_seeds: int | None = None,
) -> SweepSpec:
    """The sweep that options ask for.

    Args:
        recipe: completed.
        sizes: minibatches; None is 1 … 64 times the base, as far as the data goes.
        arms: FIELD=VALUE[,VALUE…], or "table" (the paper's T1 and T2a), "pitfalls", "none"; None is "table".
        arms_at: minibatches of the arms; None is 16 times the base where the axis has it, else its largest.
        reference_seeds: how many the reference has, from the first on; None is twice those of the others.
    """
    if len(seeds) < 1:
        raise ValueError(f"--seeds is {len(seeds)}; expected at least 1, and 5 for the paper's table")
    recipe = recipe.replace(continues="")  # every cell trains all of it
    if reference_seeds is not None and reference_seeds < len(seeds):
        raise ValueError(f"--reference-seeds is {reference_seeds}; expected at least the {len(seeds)} of --seeds")
    base, samples = recipe.base_minibatch, recipe.samples or 0
    if sizes is None:
        sizes = tuple(base * factor for factor in FACTORS if base * factor <= samples)
        if not sizes:
            raise ValueError(f"the base minibatch {base} is larger than the data set of {samples} samples")
    sizes = _sizes("minibatches", sizes)
    if not sizes:
        raise ValueError("minibatches is empty; a sweep needs at least one")
    usual = base * ARMS_AT if base * ARMS_AT in sizes else max(sizes)
    places = [*_sizes("arms_at", [] if arms_at is None else arms_at)] or [usual]
    chosen: list[Arm] = []
    for text in [arms] if isinstance(arms, str) else arms or ["table"]:
        if text == "table":
            chosen += table_arms(recipe, places)
        elif text == "pitfalls":
            if len(places) > 1:
                raise ValueError("--arm pitfalls is measured at one minibatch, since BatchNorm over all of kn names it")
            chosen += pitfall_arms(recipe, places[0])
        elif text != "none":
            chosen += parse_arm(text)
    SweepSpec(recipe=recipe, minibatches=tuple(sizes), seeds=tuple(seeds))  # refuses what the axis cannot be
    # A value that the recipe has is the recipe's own entry.
    chosen = [arm for arm in dict.fromkeys(chosen) if arm_of(applied(recipe, arm, places[0], 0), recipe)]
    at = tuple(sorted(set(places))) if chosen else ()
    minibatches = tuple(sorted({*sizes, *at}))
    most = reference_seeds or usual_reference_seeds(len(seeds), minibatches)
    return SweepSpec(
        recipe=recipe,
        minibatches=minibatches,
        seeds=tuple(seeds),
        reference_seeds=tuple(range(seeds.start, seeds.start + most)),
        arms=tuple(chosen),
        arms_at=at,
    )


def _sizes(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name} must be a list of sizes, got {values!r}; a single one is [256]")
    return tuple(positive_int(name, value) for value in values)


def usual_reference_seeds(seeds: int, minibatches: Sequence[int]) -> int:
    """How many seeds the reference has where nobody says: twice as many, if any minibatch is compared with it."""
    return 2 * seeds if len(minibatches) > 1 else seeds


OTHERS = ("arm", "curve")  # names under which an arm is somebody else's text: a CSV's column, or its file

GROUPS = {"rate": "Warmup and rate", "pitfall": "One thing wrong", "n": "BatchNorm’s n", "other": "Other changes"}
"""Questions that arms answer."""

PLAIN = {
    "warmup=none": "no warmup",
    "warmup=constant": "constant warmup",
    "warmup=gradual": "gradual warmup",
    "scaling=fixed": "the rate not scaled",
    "scaling=sqrt": "the rate scaled by √k",
    "scaling=linear": "the rate scaled by k",
    "scaling=adascale": "AdaScale",
    "zero_gamma=false": "no zero γ",
    "zero_gamma=true": "zero γ",
    "pitfall=gradient-sum-not-mean": "loss divided by n, not kn",
    "pitfall=decay-on-batchnorm": "weight decay on BatchNorm",
    "pitfall=momentum-inside-uncorrected": "rate inside the momentum, not corrected",
    "pitfall=overlapping-shards": "each worker shuffles for itself",
    "pitfall=batchnorm-stats-of-rank-0": "running statistics of process 0 alone",
    "pitfall=batchnorm-stats-k-times": "running statistics moved k times",
    "pitfall=warmup-per-epoch": "warmup in steps of an epoch",
}

KINDS = {
    **dict.fromkeys(("warmup", "warmup_epochs", "scaling", "base_lr", "milestones", "decay"), "rate"),
    **dict.fromkeys(("pitfall", "zero_gamma"), "pitfall"),
    "per_worker": "n",
}
"""The group of what changes each of these fields."""


def plain_name(arm: Arm, recipe: Recipe | None = None, minibatch: int | None = None) -> str:
    """What an arm changes, in words; a rate as a multiple of the base recipe's, BatchNorm's n as a share of kn."""
    return ", ".join(_plain(name, value, recipe, minibatch) for name, value in arm) or "the recipe"


def group_of(arm: Arm, minibatch: int | None) -> str:
    """Which of `GROUPS` an arm belongs to; BatchNorm over all of kn is a pitfall."""
    whole = ("per_worker", str(minibatch))
    kinds = {"pitfall" if change == whole else KINDS.get(change[0], "other") for change in arm}
    return kinds.pop() if len(kinds) == 1 else "other"


def _plain(name: str, value: str, recipe: Recipe | None, minibatch: int | None) -> str:
    if name in OTHERS:
        return value
    if name == "per_worker":
        return "BatchNorm over all of kn" if value == str(minibatch) else f"n = {value}"
    if name == "base_lr" and recipe is not None:
        factor = Fraction(value) / Fraction(str(recipe.base_lr))
        words = {Fraction(1, 2): "half the rate", Fraction(2): "twice the rate"}
        return words.get(factor, f"{float(factor):.3g} times the rate")
    return PLAIN.get(f"{name}={value}", f"{name} = {value}")


def _arm_from(text: str, file: Path) -> Arm:
    pairs = [part.partition("=") for part in text.split(",")]
    for name, _, value in pairs:
        _value(name, value)
    return tuple((name, Read(value, file)) for name, _, value in pairs)


def _text(value: Any) -> str:
    if isinstance(value, bool | None):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _value(name: str, text: str) -> Any:
    hint = get_type_hints(Recipe).get(name)
    if hint is None:
        return Recipe().replace(**{name: text})  # which offers the nearest name
    if text == "none" and type(None) in get_args(hint):
        return None
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text == "true"
    if name in SIZES:
        return parse_size(text)
    if get_origin(hint) is tuple:
        return tuple(text.split("+")) if text else ()
    kind = next((kind for kind in get_args(hint) if isinstance(kind, type)), hint)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        raise ValueError(f"{name} must be a number, got {text!r}") from None

"""The commands that make a study again, and what it ran on."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from onehour.config import Recipe
from onehour.recipes import RECIPES
from onehour.study.results import Result, Study
from onehour.study.spec import SweepSpec

__all__ = ["BASE", "commands", "environment_of", "left_over", "more_seeds", "unfinished"]

BASE = "base-recipe.toml"
"""The file beside a report that holds a recipe which has no name."""

OWN = ("name", "minibatch", "seed", "samples", "classes")
"""What a command says by itself, or reads from the data."""

HIDDEN = ("command", "from_iteration")
"""Of an environment: how it was started, which may name private places."""


def commands(study: Study) -> list[str]:
    """What to type to have the same runs again; nothing for models and data that were given from Python."""
    recipe = study.recipe
    if recipe is None or "<" in (recipe.model[:1], recipe.data[:1]):
        return []
    if study.spec is not None:
        return [_sweep(study.spec, seeds) for seeds in _blocks(study.spec.seeds)]
    found = []
    for entry in study.entries:
        for result in entry.results:
            if result.environment and result.minibatch is not None:  # of a run's folder
                found.append(shlex.join(["onehour", "train", *_run(recipe, result)]))
    return found


def more_seeds(study: Study, seeds: int) -> str:
    """What to type so that a sweep has so many seeds in all; "" where it is no sweep."""
    if study.spec is None or not commands(study):
        return ""
    first = min(study.spec.seeds)
    sources = [PurePath(result.source) for result in _results(study)]
    folder = sources[0].parent.parent if sources else PurePath("DIR")
    command = _sweep(study.spec, range(first, first + seeds), str(folder / BASE))
    return f"{command} --out {shlex.quote(str(folder))}"


def environment_of(study: Study) -> list[tuple[str, str]]:
    """What the runs ran on: each key with the values that occur."""
    values: dict[str, list[str]] = {}
    for result in _results(study):
        for key, value in result.environment.items():
            if key not in HIDDEN and value is not None and _plain(value) not in values.setdefault(key, []):
                values[key].append(_plain(value))
    return [(key.replace("_", " "), "; ".join(found)) for key, found in values.items() if found]


def unfinished(study: Study) -> list[str]:
    """Cells of a sweep, and runs, that have not ended."""
    if study.spec is None:
        return [PurePath(result.source).name for result in _results(study) if result.error is None]
    ended = {_key(result) for result in _results(study) if result.error is not None}
    cells = study.spec.cells()
    return [cell.name for cell in cells if (cell.arm, cell.recipe.minibatch, cell.recipe.seed) not in ended]


def left_over(study: Study) -> int:
    """How many runs lie in a sweep's folder that its sweep.toml does not ask for."""
    if study.spec is None:
        return 0
    asked = {(cell.arm, cell.recipe.minibatch, cell.recipe.seed) for cell in study.spec.cells()}
    return sum(_key(result) not in asked for result in _results(study))


def _key(result: Result) -> tuple[Any, int | None, int | None]:
    return result.arm, result.minibatch, result.seed


def _results(study: Study) -> Iterable[Result]:
    return (result for entry in study.entries for result in entry.results)


def _sweep(spec: SweepSpec, seeds: range, file: str = BASE) -> str:
    recipe, flags = _flags(spec.recipe, file)
    words = ["onehour", "sweep", recipe, *flags]
    words += ["--minibatch", ",".join(map(str, spec.minibatches)), "--seeds", str(len(seeds))]
    words += ["--seed", str(seeds.start)] if seeds.start else []
    fields: dict[str, list[str]] = {}
    for ((name, value),) in (arm for arm in spec.arms if len(arm) == 1):
        fields.setdefault(name, []).append(value)
    for name, values in fields.items():
        words += ["--arm", f"{name}={','.join(values)}"]
    words += ["--arms-at", ",".join(map(str, spec.arms_at))] if spec.arms_at else ["--arm", "none"]
    return shlex.join(words)


def _run(base: Recipe, result: Result) -> list[str]:
    spec = SweepSpec(recipe=base, minibatches=(base.minibatch,), seeds=(0,))
    recipe = spec.applied(result.arm, result.minibatch or 0, result.seed or 0)
    name, flags = _flags(recipe, f"{PurePath(result.source).name}/recipe.toml")
    if name not in RECIPES:
        return [name]
    return [name, "--minibatch", str(recipe.minibatch), "--seed", str(recipe.seed), *flags]


def _blocks(seeds: Sequence[int]) -> list[range]:
    """Seeds as ranges without gaps, for a command each."""
    blocks: list[range] = []
    for seed in sorted(seeds):
        if blocks and blocks[-1].stop == seed:
            blocks[-1] = range(blocks[-1].start, seed + 1)
        else:
            blocks.append(range(seed, seed + 1))
    return blocks


def _flags(recipe: Recipe, file: str) -> tuple[str, list[str]]:
    """A named recipe and the flags that change it; a file that holds it where it has no name."""
    if recipe.name not in RECIPES:
        return file, []
    named, values = RECIPES[recipe.name]().as_dict(), recipe.as_dict()
    flags: list[str] = []
    for key, value in values.items():
        if key not in OWN and value != named.get(key):
            flag = f"--{key.replace('_', '-')}"
            if isinstance(value, bool):
                flags.append(flag if value else f"--no-{flag[2:]}")
            else:
                flags += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return recipe.name, flags


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

"""The commands that make a study again, and what it ran on."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from pathlib import PurePath

from onehour.config import Recipe
from onehour.entry import names_code
from onehour.recipes import RECIPES
from onehour.study.findings import Findings
from onehour.study.results import Result, Study
from onehour.study.spec import Arm, SweepSpec, applied, arm_of, usual_reference_seeds
from onehour.training.record import TOP1_ERROR

BASE = "base-recipe.toml"  # beside a report, with a recipe that has no name
OWN = ("name", "minibatch", "seed", "samples", "classes")  # what a command says by itself, or reads from the data
HIDDEN = ("command", "from_iteration", "class_names", "init", "init_anew", "init_left_out")
"""Of an environment: how it was started, which may name private places, and what is long."""


def commands(study: Study) -> list[str]:
    """What to type to have the same runs again; nothing for models and data that were given from Python."""
    recipe = study.recipe
    if recipe is None or "<" in (recipe.model[:1], recipe.data[:1]):
        return []
    if study.spec is not None:
        return [_sweep(study.spec, seeds) for seeds in _blocks(study.spec.seeds)]
    found = []
    for run in study.results:
        if run.environment and run.minibatch is not None:  # of a folder
            own = applied(recipe, run.arm, run.minibatch, run.seed or 0)
            name, flags = _flags(own, f"{PurePath(run.source).name}/recipe.toml")
            if name in RECIPES:
                flags = ["--minibatch", str(own.minibatch), "--seed", str(own.seed), *flags]
            found.append(shlex.join(["onehour", "train", name, *flags]))
    return found


def more_seeds(findings: Findings, seeds: int) -> str:
    """What to type so that a sweep has so many seeds in all; "" where it is no sweep, and for no seeds."""
    study = findings.study
    sources = [PurePath(result.source) for entry in study.flat for result in entry.results]
    run = next((source for source in sources if source.parent.name == "cells"), None)  # a CSV may be beside them
    if study.spec is None or not seeds or not commands(study) or run is None:
        return ""
    first, folder = min(study.spec.seeds), run.parent.parent
    command = _sweep(study.spec, range(first, first + seeds), str(run / "recipe.toml"), usual=True)
    judged = f" --margin {findings.margin:g}" * (findings.margin != 0.5 or findings.metric != TOP1_ERROR)
    judged += f" --looks {findings.looks}" * (findings.looks != 1)
    return f"{command}{judged} --out {shlex.quote(str(folder))}"


def environment_of(study: Study) -> list[tuple[str, str]]:
    """What the runs ran on: each key with the values that occur."""
    values: dict[str, dict[str, None]] = {}
    for result in study.results:
        for key, value in result.environment.items():
            if key not in HIDDEN and value is not None:
                text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
                values.setdefault(key, {})[text] = None
    return [(key.replace("_", " "), "; ".join(found)) for key, found in values.items()]


def unfinished(study: Study) -> list[str]:
    """Cells of a sweep, and runs, that have not ended."""
    if study.spec is None:
        return [PurePath(result.source).name for result in study.results if result.error is None]
    ended = {_key(result) for result in study.results if result.error is not None}
    return [name for key, name in _asked(study.spec).items() if key not in ended]


def left_over(study: Study) -> int:
    """How many runs lie in a sweep's folder that its sweep.toml does not ask for."""
    if study.spec is None:
        return 0
    asked = _asked(study.spec)
    return sum(_key(result) not in asked for result in study.results)


def _asked(spec: SweepSpec) -> dict[tuple[Arm, int | None, int | None], str]:
    cells = ((arm_of(cell.recipe, spec.recipe), cell) for cell in spec.cells())
    return {(arm, cell.recipe.minibatch, cell.recipe.seed): cell.name for arm, cell in cells}


def _key(result: Result) -> tuple[Arm, int | None, int | None]:
    return result.arm, result.minibatch, result.seed


def _sweep(spec: SweepSpec, seeds: range, file: str = BASE, *, usual: bool = False) -> str:
    """The command for these seeds; the reference has the seeds that it has, or the usual ones."""
    recipe, flags = _flags(spec.recipe, file)
    words = ["onehour", "sweep", recipe, *flags]
    words += ["--minibatch", ",".join(map(str, spec.minibatches)), "--seeds", str(len(seeds))]
    known = {*spec.seeds, *spec.reference_seeds}
    reference = next(n for n in itertools.count(len(seeds)) if seeds.start + n not in known)
    if not usual and reference != usual_reference_seeds(len(seeds), spec.minibatches):
        words += ["--reference-seeds", str(reference)]
    words += ["--seed", str(seeds.start)] if seeds.start else []
    fields: dict[str, list[str]] = {}
    for ((name, value),) in (arm for arm in spec.arms if len(arm) == 1):
        fields.setdefault(name, []).append(value)
    for name, values in fields.items():
        words += ["--arm", f"{name}={','.join(values)}"]
    words += ["--arms-at", ",".join(map(str, spec.arms_at))] if spec.arms_at else ["--arm", "none"]
    return shlex.join(words)


def _blocks(seeds: Sequence[int]) -> list[range]:
    """Seeds as ranges without gaps, for a command each."""
    runs = itertools.groupby(enumerate(sorted(seeds)), key=lambda pair: pair[1] - pair[0])
    blocks = ([seed for _, seed in run] for _, run in runs)
    return [range(block[0], block[-1] + 1) for block in blocks]


def _flags(recipe: Recipe, file: str) -> tuple[str, list[str]]:
    """A named recipe and the flags that change it; a file that holds it where it has no name."""
    if recipe.name not in RECIPES or recipe.continues:
        return file, ["--trust"] * names_code(recipe)
    # --epochs moves warmup and milestones, also where the study kept them.
    moved = RECIPES[recipe.name]().replace(epochs=recipe.epochs, decay=recipe.decay, warmup=recipe.warmup)
    of_study = ("epochs", "decay", "warmup")
    named = moved.as_dict() | {key: getattr(RECIPES[recipe.name](), key) for key in of_study}
    flags: list[str] = []
    for key, value in recipe.as_dict().items():
        if key not in OWN and value != named.get(key):
            flag = key.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                flags += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return recipe.name, flags

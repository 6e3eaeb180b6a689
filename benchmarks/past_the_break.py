"""What can be had past the linear rule's break: a ramp, AdaScale and Muon at 32 and 64 times the minibatch, on digits.

    python benchmarks/past_the_break.py            # resumable: what runs/past-the-break, or the committed results, hold
    python benchmarks/past_the_break.py --trial    # an epoch and few seeds, into another folder: does it work at all?

Every arm, the reference at 1× too, has the same budget: four rates, a factor of 2 apart, on two seeds; the best mean is
trained on ten other seeds. A rate at an end of its four is marked: there might be a better one beyond. The advised ramp
is what `onehour advise --minibatch` says of one run at 1×. Split 51 and these seeds were never used for anything.
AdaScale comes last, since it takes most of the time: about 4 of 6 hours on one core. Rows of the committed results are
not trained again; to begin anew, remove that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import onehour
from onehour.config import Recipe
from onehour.data.sources import complete
from onehour.execution import Execution
from onehour.recipes import RECIPES
from onehour.study.advice import Advice, advice_of
from onehour.sweeps.task import Task, run_task
from onehour.training.record import Run, finished_run
from results import RESULTS, claim, made_by, mean_std, write

OUT = Path("runs") / "past-the-break"
TUNING, SEEDS, NOISE_SEED = (9100, 9101), tuple(range(9000, 9010)), 9200
TIMES = (32, 64)
CHANCE = 90.0
"""The error of a run that has left the finite numbers, as reports count it."""
CHANGES: dict[str, dict[str, Any]] = {
    "linear": {},
    "ramp": {"ramp": ("256:8",)},
    "adascale": {"scaling": "adascale"},
    "muon": {"optimizer": "muon", "scaling": "fixed"},
}
"""What an arm changes; "linear" with warmup is the paper's rule. The ramp is a prototype's, known before."""
RATES = {"reference": 0.1, "linear": 0.025, "ramp": 0.05, "advised ramp": 0.05, "muon": 0.05, "adascale": 0.1}
"""The lowest of each arm's four rates: those past the break begin lower than the recipe's 0.2, Muon's are its own."""


@dataclass(frozen=True)
class Budget:
    """How much is trained: what the claims rest on, or a trial."""

    out: Path = OUT
    tuning: tuple[int, ...] = TUNING
    seeds: tuple[int, ...] = SEEDS
    rates: int = 4
    epochs: int | None = None


TRIAL = Budget(OUT.with_name("past-the-break-trial"), TUNING[:1], SEEDS[:2], rates=2, epochs=1)


def train(budget: Budget, recipe: Recipe, seeds: Sequence[int]) -> list[Run]:
    """The runs of a recipe, as one network where that is exact; those that have ended are not trained again."""
    if budget.epochs is not None:
        recipe = recipe.replace(epochs=budget.epochs)
    named = {"ramp": "+".join(recipe.ramp), "scaling": recipe.scaling, "optimizer": recipe.optimizer}
    label = "-".join(part.replace(":", "_").replace("/", "_") for part in named.values() if part)
    folders = {seed: budget.out / f"{recipe.minibatch}-{label}-{recipe.base_lr:g}-s{seed}" for seed in seeds}
    recipes = {seed: recipe.replace(seed=seed) for seed in seeds}
    left = [seed for seed in seeds if not _ended(folders[seed], recipes[seed])]
    if left:
        task = Task(tuple(recipes[seed] for seed in left), tuple(folders[seed] for seed in left))
        alone = run_task(task, Execution(), lambda: False)
        print(f"{len(left)} of {folders[left[0]].name}{f' one by one: {alone}' if alone else ''}", flush=True)
    return [Run(folder) for folder in folders.values()]


def _ended(folder: Path, recipe: Recipe) -> bool:
    if finished_run(folder, recipe) is not None:
        return True
    return (folder / "recipe.toml").is_file() and Run(folder).summary.get("outcome") == "non-finite"


def measured(budget: Budget, arm: str, recipe: Recipe, times: int) -> dict[str, Any]:
    """Choose an arm's rate on the tuning seeds, and train it on the others."""
    rates = [RATES[arm] * 2**number for number in range(budget.rates)]
    tuned = {}
    for rate in rates:
        tuned[rate] = float(
            np.mean([_error(run) for run in train(budget, recipe.replace(base_lr=rate), budget.tuning)])
        )
    rate = min(tuned, key=tuned.__getitem__)
    runs = train(budget, recipe.replace(base_lr=rate), budget.seeds)
    errors = [_error(run) for run in runs]
    return {
        "arm": arm,
        "times": times,
        "minibatch": recipe.minibatch,
        "ramp": list(recipe.ramp),
        "base_lr": rate,
        "tuned": [{"base_lr": tried, "error": error} for tried, error in tuned.items()],
        "at_an_end": rate in (rates[0], rates[-1]),
        **mean_std(errors),
        "non_finite": sum(not run.finished for run in runs),
        "errors": {str(run.recipe.seed): error for run, error in zip(runs, errors, strict=True)},
        "updates": [run.metrics[-1]["iteration"] for run in runs if run.finished],
        "images": [run.metrics[-1]["position"] for run in runs if run.finished],
        "cpu_seconds": [sum(line["cpu_seconds"] for line in run.timing) for run in runs if run.finished],
    }


def _error(run: Run) -> float:
    return run.final_error if run.finished else CHANCE


def advised(budget: Budget, reference: Recipe) -> Advice:
    """What one run at 1× says, with the rate that was chosen there."""
    folder, recipe = budget.out / "noise", reference.replace(seed=NOISE_SEED)
    return advice_of(finished_run(folder, recipe) or onehour.train(recipe, out=folder, noise=True))


def main() -> int:
    """Train what is missing; write what was seen, after each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trial", action="store_true", help="an epoch and few seeds; writes no result")
    trial = parser.parse_args().trial
    budget = TRIAL if trial else Budget()
    path = RESULTS / "past_the_break.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not trial else {}
    rows = {(row["times"], row["arm"]): row for row in known.get("rows", [])}
    if not trial:
        claim(OUT, __file__)
    base, _ = complete(RECIPES["digits"](data="digits:51"))
    scale: float | None = known.get("noise_scale")

    def measure(arm: str, recipe: Recipe, times: int) -> None:
        row = measured(budget, arm, recipe, times) | made_by()
        print(f"{times}× {arm:<13} {row['base_lr']:<6g} {row['mean']:6.2f} % {row['updates']} updates", flush=True)
        rows[times, arm] = row
        if not trial:
            ordered = sorted(rows.values(), key=lambda row: (row["times"], [*RATES].index(row["arm"])))
            write(__file__, "past_the_break", {"rows": ordered, "noise_scale": scale, "data": "digits:51"})

    if (1, "reference") not in rows:
        measure("reference", base, 1)
    left = [(times, arm) for arm in RATES if arm != "reference" for times in TIMES if (times, arm) not in rows]
    advice = None
    if any(arm == "advised ramp" for _, arm in left) and not trial:
        advice = advised(budget, base.replace(base_lr=rows[1, "reference"]["base_lr"]))
        scale = advice.noise.scale
    for times, arm in left:
        recipe = base.replace(minibatch=times * base.minibatch, **CHANGES.get(arm, {}))
        if arm == "advised ramp":
            recipe = recipe.replace(ramp=("128:8",) if advice is None else advice.ramp(base, recipe.minibatch))
        measure(arm, recipe, times)
    return 0


if __name__ == "__main__":
    sys.exit(main())

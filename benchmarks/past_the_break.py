"""What can be had past the linear rule's break: a ramp, AdaScale and Muon at 32 and 64 times the minibatch.

    python benchmarks/past_the_break.py digits     # resumable: what runs/past-the-break, or the committed results, hold
    python benchmarks/past_the_break.py fashion    # needs Fashion-MNIST (fashion_figure.py), and about 8 hours
    python benchmarks/past_the_break.py digits --trial    # an epoch and few seeds, which write no result

Every arm of a task, the reference at 1× too, has the same budget: rates a factor of 2 apart, on seeds for tuning; the
best mean is trained on other seeds. A rate at an end of those tried is marked: there might be a better one beyond. The
advised ramp is what `onehour advise --minibatch` says of one run at 1×. Split 51 of the digits and these seeds were
never used for anything. AdaScale comes last, since it takes most of the time. Rows of the committed results are not
trained again; to begin anew, remove them from that file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import onehour
from onehour.config import Recipe
from onehour.data.sources import complete
from onehour.execution import Execution
from onehour.recipes import RECIPES
from onehour.study.advice import Advice, advice_of
from onehour.sweeps.task import Task, run_task
from onehour.training.record import Run, finished_run
from results import RESULTS, claim, made_by, mean_std, write

TIMES = (32, 64)
CHANCE = 90.0
"""The error of a run that has left the finite numbers, as reports count it: both tasks have ten classes."""
CHANGES: dict[str, dict[str, Any]] = {
    "adascale": {"scaling": "adascale"},
    "muon": {"optimizer": "muon", "scaling": "fixed"},
}
"""What an arm changes; "linear" with warmup is the paper's rule."""


@dataclass(frozen=True)
class Budget:
    """A task, and how much of it is trained.

    Args:
        changes: of the recipe.
        ramp: a prototype's, known before.
        lowest: of each arm's rates: those past the break begin lower than the recipe's, Muon's are its own.
        noise: the seed of the run that advises.
        together: seeds as one network, where that is exact; on a CPU wide networks are faster one by one.
    """

    task: str
    changes: dict[str, Any]
    ramp: str
    lowest: dict[str, float]
    rates: int
    tuning: tuple[int, ...]
    seeds: tuple[int, ...]
    noise: int
    out: Path
    together: bool = True


DIGITS = Budget(
    task="digits",
    changes={"data": "digits:51"},
    ramp="256:8",
    lowest={"reference": 0.1, "linear": 0.025, "ramp": 0.05, "advised ramp": 0.05, "muon": 0.05, "adascale": 0.1},
    rates=4,
    tuning=(9100, 9101),
    seeds=tuple(range(9000, 9010)),
    noise=9200,
    out=Path("runs") / "past-the-break",
)
FASHION = Budget(
    task="fashion",
    changes={"precision": "bf16", "channels_last": True},
    ramp="512:6",
    lowest={"reference": 0.05, "linear": 0.0125, "ramp": 0.05, "advised ramp": 0.05, "muon": 0.1, "adascale": 0.1},
    rates=3,
    tuning=(9300,),
    seeds=tuple(range(9310, 9315)),
    noise=9400,
    out=Path("runs") / "past-the-break-fashion",
    together=torch.cuda.is_available(),
)
TASKS = {budget.task: budget for budget in (DIGITS, FASHION)}


def trial_of(budget: Budget) -> Budget:
    """An epoch of little, with a ramp that fits into it."""
    out = budget.out.with_name(f"{budget.out.name}-trial")
    changes = {**budget.changes, "epochs": 1, "milestones": (), "warmup": "none"}
    return replace(budget, changes=changes, rates=2, tuning=budget.tuning[:1], seeds=budget.seeds[:2], out=out)


def train(budget: Budget, recipe: Recipe, seeds: Sequence[int]) -> list[Run]:
    """The runs of a recipe; those that have ended are not trained again."""
    named = {"ramp": "+".join(recipe.ramp), "scaling": recipe.scaling, "optimizer": recipe.optimizer}
    label = "-".join(part.replace(":", "_").replace("/", "_") for part in named.values() if part)
    folders = {seed: budget.out / f"{recipe.minibatch}-{label}-{recipe.base_lr:g}-s{seed}" for seed in seeds}
    recipes = {seed: recipe.replace(seed=seed) for seed in seeds}
    left = [seed for seed in seeds if not _ended(folders[seed], recipes[seed])]
    for some in ([left] if budget.together else [[seed] for seed in left]) if left else []:
        task = Task(tuple(recipes[seed] for seed in some), tuple(folders[seed] for seed in some))
        alone = run_task(task, Execution(), lambda: False)
        print(f"{len(some)} of {folders[some[0]].name}{f' one by one: {alone}' if alone else ''}", flush=True)
    return [Run(folder) for folder in folders.values()]


def _ended(folder: Path, recipe: Recipe) -> bool:
    if finished_run(folder, recipe) is not None:
        return True
    return (folder / "recipe.toml").is_file() and Run(folder).summary.get("outcome") == "non-finite"


def measured(budget: Budget, arm: str, recipe: Recipe, times: int) -> dict[str, Any]:
    """Choose an arm's rate on the tuning seeds, and train it on the others."""
    rates = [budget.lowest[arm] * 2**number for number in range(budget.rates)]
    tuned = {}
    for rate in rates:
        tuned[rate] = float(
            np.mean([_error(run) for run in train(budget, recipe.replace(base_lr=rate), budget.tuning)])
        )
    rate = min(tuned, key=tuned.__getitem__)
    runs = train(budget, recipe.replace(base_lr=rate), budget.seeds)
    errors = [_error(run) for run in runs]
    return {
        "task": budget.task,
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
    folder, recipe = budget.out / "noise", reference.replace(seed=budget.noise)
    return advice_of(finished_run(folder, recipe) or onehour.train(recipe, out=folder, noise=True))


def main() -> int:
    """Train what is missing; write what was seen, after each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--trial", action="store_true", help="an epoch and few seeds; writes no result")
    options = parser.parse_args()
    task, trial = TASKS[options.task], options.trial
    budget = trial_of(task) if trial else task
    path = RESULTS / "past_the_break.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not trial else {}
    earlier = [{"task": "digits"} | row for row in known.get("rows", [])]  # the first results were theirs alone
    rows = {(row["task"], row["times"], row["arm"]): row for row in earlier}
    scales: dict[str, float | None] = known.get("noise_scales", {"digits": known.get("noise_scale")})
    if not trial:
        claim(budget.out, __file__)
    base, _ = complete(RECIPES[task.task](**budget.changes))

    def place(row: dict[str, Any]) -> tuple[int, int, int]:
        return [*TASKS].index(row["task"]), row["times"], [*task.lowest].index(row["arm"])

    def measure(arm: str, recipe: Recipe, times: int) -> None:
        row = measured(budget, arm, recipe, times) | made_by()
        print(f"{times}× {arm:<13} {row['base_lr']:<6g} {row['mean']:6.2f} % {row['updates']} updates", flush=True)
        rows[task.task, times, arm] = row
        if not trial:
            content = {"rows": sorted(rows.values(), key=place), "noise_scales": scales}
            write(__file__, "past_the_break", content | {"data": {each.task: each.changes for each in TASKS.values()}})

    if (task.task, 1, "reference") not in rows:
        measure("reference", base, 1)
    left = [(times, arm) for arm in task.lowest if arm != "reference" for times in TIMES]
    left = [(times, arm) for times, arm in left if (task.task, times, arm) not in rows]
    advice = None
    if any(arm == "advised ramp" for _, arm in left) and not trial:
        advice = advised(budget, base.replace(base_lr=rows[task.task, 1, "reference"]["base_lr"]))
        scales[task.task] = advice.noise.scale
    for times, arm in left:
        recipe = base.replace(minibatch=times * base.minibatch, **CHANGES.get(arm, {}))
        if "ramp" in arm:
            known_before = (f"{base.minibatch}:0.5" if trial else budget.ramp,)
            recipe = recipe.replace(
                ramp=known_before if advice is None or arm == "ramp" else advice.ramp(base, recipe.minibatch)
            )
        measure(arm, recipe, times)
    return 0


if __name__ == "__main__":
    sys.exit(main())

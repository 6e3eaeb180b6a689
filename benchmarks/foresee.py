"""Where the linear rule breaks, foreseen from runs at the base minibatch, then seen in sweeps.

    python benchmarks/foresee.py            # the predictions: commit results/foresee.json
    python benchmarks/foresee.py --judge    # then the sweeps, against what was committed: results/foresee_sweeps.json

A prediction is B = Σ tr Σ / Σ |G|² over the points of one run at 1× with `--noise`, trained to its first drop. It
predicts the break: the minibatch at which the mean error over seeds has risen by half a point above that at 1×,
between two sizes of the sweep along log2(kn). It is a hit where the break lies within a factor of 2 of B. Splits 41 and
42 and these seeds were never used for anything, and the sweeps' seeds are others. Fashion-MNIST's sweep is its figure's
(fashion_figure.py). Both are resumable (runs/foresee).
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import onehour
from onehour.cli import main as main_command
from onehour.data.sources import complete
from onehour.recipes import RECIPES
from onehour.study.advice import FACTOR, advice_of
from onehour.study.results import Study, read_study
from onehour.training.decisions import decisions_of
from onehour.training.measure import peak_epochs
from onehour.training.record import Run, StoppedError
from results import RESULTS, ROOT, claim, write

OUT = Path("runs") / "foresee"
FORESEEN = RESULTS / "foresee.json"
MARGIN = 0.5
"""Points above 1× that are the break."""
SEED = 8000
SWEPT = {"first": 8100, "seeds": 5}


@dataclass(frozen=True)
class Case:
    """A task whose break is foreseen: a recipe, what is changed of it, and the sizes of its sweep."""

    name: str
    recipe: str
    changes: dict[str, Any]
    sizes: str
    figure: Path | None = None
    """Where a figure of the same recipe has trained the sweep already."""

    @property
    def flags(self) -> list[str]:
        """Its changes on the command line."""
        return [part for name, value in self.changes.items() for part in (f"--{name.replace('_', '-')}", str(value))]


CASES = (
    Case("digits-0.2", "digits", {"data": "digits:41", "base_lr": 0.2}, "32,64,128,256,512,1024,2048,4096"),
    Case("digits-0.05", "digits", {"data": "digits:41", "base_lr": 0.05}, "32,64,128,256,512,1024,2048,4096"),
    Case("wide-0.05", "digits", {"data": "digits-wide:42", "base_lr": 0.05}, "32,256,512,1024,2048,4096,8192"),
    Case("wide-0.2", "digits", {"data": "digits-wide:42", "base_lr": 0.2}, "32,128,256,512,1024,2048,4096"),
    Case("fashion", "fashion", {}, "64,128,256,512,1024,2048,4096,8192", Path("runs") / "fashion-figure"),
)


def predict(case: Case) -> dict[str, Any]:
    """Train a case at 1×, as far as its rate is at its peak, and say where it breaks."""
    run = train_to_the_drop(case, SEED)
    advice = advice_of(run)
    scale = advice.noise.scale
    return {
        "case": case.name,
        "command": f"onehour train {shlex.join([case.recipe, *case.flags])} --noise",
        "seed": SEED,
        "epochs": len(run.metrics),
        "sizes": case.sizes,
        "break_from": scale / FACTOR if scale else None,
        "break_to": scale * FACTOR if scale else None,
        "advice": advice.as_dict(),
        "measured": run.noise,
    }


def train_to_the_drop(case: Case, seed: int) -> Run:
    """A run with its noise, which no later iteration measures: it is stopped there."""
    recipe, _ = complete(onehour.recipe(case.recipe, **case.changes))
    decisions, folder = decisions_of(recipe), OUT / f"{case.name}-s{seed}"
    last = peak_epochs(decisions).stop
    if not folder.is_dir() or len(Run(folder).metrics) < last:
        asked = count(1)
        stop = -(-last * decisions.samples // recipe.minibatch)
        with suppress(StoppedError):
            onehour.train(recipe, seed=seed, out=folder, noise=True, fresh=True, stop_asked=lambda: next(asked) == stop)
    return Run(folder)


def break_of(study: Study) -> tuple[float | None, dict[int, float]]:
    """The minibatch at which the error is `MARGIN` points above that at 1×, None beyond the largest; and all points."""
    means = {entry.minibatch: entry.mean for entry in study.flat if entry.minibatch is not None}
    assert study.recipe is not None
    excess = {size: mean - means[study.recipe.base_minibatch] for size, mean in sorted(means.items())}
    for (before, low), (after, high) in pairwise(excess.items()):
        if high >= MARGIN:
            share = (MARGIN - low) / (high - low)
            return 2 ** (math.log2(before) + share * math.log2(after / before)), excess
    return None, excess


def judge(case: Case, foreseen: dict[str, Any], jobs: int) -> dict[str, Any]:
    """Train a case's sweep, if no figure has it, and compare."""
    out = case.figure or OUT / f"{case.name}-sweep"
    seeds = ["--seed", str(SWEPT["first"]), "--seeds", str(SWEPT["seeds"]), "--seeds-together", str(SWEPT["seeds"])]
    command = ["sweep", case.recipe, *case.flags, "--minibatch", case.sizes, *seeds, "--arm", "none"]
    if case.figure is None and (code := main_command([*command, "--jobs", str(jobs), "--out", str(out)])):
        raise SystemExit(code)
    study = read_study([out])
    seen, excess = break_of(study)
    scale = foreseen["advice"]["noise_scale"]
    hit = None
    if scale and seen:
        hit = foreseen["break_from"] <= seen <= foreseen["break_to"]
    elif scale and max(excess) > foreseen["break_to"]:
        hit = False
    return {
        "case": case.name,
        "command": "make figure-fashion" if case.figure else f"onehour {shlex.join(command)}",
        "noise_scale": scale,
        "low": foreseen["advice"]["low"],
        "high": foreseen["advice"]["high"],
        "break": seen,
        "ratio": seen / scale if seen and scale else None,
        "hit": hit,
        "points": [
            {
                "minibatch": entry.minibatch,
                "mean": entry.mean,
                "std": entry.std,
                "n": entry.n,
                "difference": excess[entry.minibatch or 0],
                "errors": {str(result.seed): result.error for result in entry.results},
            }
            for entry in study.flat
        ],
    }


def committed() -> tuple[str, dict[str, dict[str, Any]]]:
    """The commit that holds the predictions, and the predictions by case."""
    path = str(FORESEEN.relative_to(ROOT))

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()

    commit = git("log", "-1", "--format=%H", "--", path)
    if not commit or git("status", "--porcelain", "--", path):
        raise SystemExit(f"commit {path} first: a prediction is one only before it is seen")
    rows = json.loads(FORESEEN.read_text(encoding="utf-8"))["rows"]
    return commit, {row["case"]: row for row in rows}


def main() -> int:
    """Predict, or judge what was predicted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--judge", action="store_true", help="run the sweeps, once the predictions are committed")
    parser.add_argument("--case", action="append", help="these alone; what is known of others stays")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    cases = [case for case in CASES if case.recipe in RECIPES and case.name in (options.case or [case.name])]
    name = "foresee_sweeps" if options.judge else "foresee"
    path = RESULTS / f"{name}.json"
    known = {row["case"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]} if path.is_file() else {}
    claim(OUT, __file__)
    if options.judge:
        commit, foreseen = committed()
        for case in cases:
            if case.name in foreseen:
                known[case.name] = judge(case, foreseen[case.name], options.jobs)
        content: dict[str, Any] = {"foreseen_at": commit}
    else:
        known |= {case.name: predict(case) for case in cases if case.name not in known}
        content = {"says": "the break is within a factor of 2 of B", "factor": FACTOR, "margin": MARGIN}
    rows = [known[case.name] for case in CASES if case.name in known]
    write(__file__, name, {**content, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The digits' figure: error against minibatch, arms, pitfalls and BatchNorm's n; what is promised of it, checked.

    make figure

Resumable: what runs/figure holds is not run again. Split 7 of the originals and seeds from 1000 on: no setting was ever
chosen on them. Writes results/digits_figure.json, of which docs/tables.py draws docs/images/digits.*.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from onehour.cli import main as onehour
from onehour.study.findings import Row, findings_of
from onehour.study.results import read_study
from results import RESULTS, claim, made_by, write

__all__ = ["Cell", "claimed", "draw_figure", "known_entries"]

Cell = tuple[str, int]
"""An arm, "" for the recipe itself, and a minibatch."""

OUT = Path("runs") / "figure"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
COMMAND = [
    *("sweep", "digits", "--data", "digits:7", "--seed", "1000", "--seeds", "10", "--seeds-together", "5"),
    *("--arm", "table", "--arm", "pitfalls", "--arm", "per_worker=4,8,32,64", "--out", str(OUT)),
]
BASE, SHOWN = 32, 512
"""1× and 16×."""


def described(row: Row, group: str) -> dict[str, Any]:
    """A row of the report with every run."""
    entry = row.entry
    return {
        "group": group,
        "name": row.name,
        "arm": entry.label,
        "minibatch": entry.minibatch,
        "mean": entry.mean,
        "std": entry.std,
        "n": entry.n,
        "non_finite": row.non_finite,
        "early_gap": None if math.isnan(row.early) else row.early,
        "seconds": row.mean_seconds,
        "errors": {str(result.seed): result.error for result in entry.results},
    }


def claims(means: dict[Cell, float]) -> list[dict[str, Any]]:
    """What is promised of this figure, and whether it shows it."""
    base, shown = means["", BASE], means["", SHOWN]
    return [
        claimed("8× within 0.7 points of 1×", abs(means["", 8 * BASE] - base), "≤", 0.7),
        claimed("16× at most 1.0 point above 1×", shown - base, "≤", 1.0),
        claimed("no warmup at least 0.5 points above gradual", means["warmup=none", SHOWN] - shown, "≥", 0.5),
        claimed("constant warmup at least 5 points above gradual", means["warmup=constant", SHOWN] - shown, "≥", 5.0),
        claimed(
            "a fixed rate at least 0.4 points above the linear rule", means["scaling=fixed", SHOWN] - shown, "≥", 0.4
        ),
        claimed("a break by 64×", means["", 64 * BASE] - base, "≥", 5.0),
    ]


def claimed(text: str, points: float, relation: str, bound: float) -> dict[str, Any]:
    """A claim, what was seen, and whether it holds."""
    holds = points <= bound if relation == "≤" else points >= bound
    return {"claim": text, "points": points, "relation": relation, "bound": bound, "holds": holds}


def place(entry: dict[str, Any]) -> tuple[bool, str, int, str]:
    """Where an entry stands in the results: the recipe's own first, then the arms of a kind together."""
    return entry["group"] != "minibatch", entry["group"], entry["minibatch"], entry["arm"]


def known_entries(script: str) -> dict[Cell, dict[str, Any]]:
    """The entries of a figure's committed results, each with what made it."""
    path = RESULTS / f"{Path(script).stem}.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    about = results["provenance"]
    made = {"date": about["date"], "commit": about["commit"], "made_on": about["gpu"] or about["processor"]}
    judged = ("difference", "state", "verdict")  # which earlier results have, and docs make anew
    known = [{key: value for key, value in entry.items() if key not in judged} for entry in results["entries"]]
    return {(entry["arm"], entry["minibatch"]): made | entry for entry in known}


def draw_figure(
    script: str,
    out: Path,
    commands: Iterable[list[str]],
    claims: Callable[[dict[Cell, float]], list[dict[str, Any]]],
    *,
    entries: dict[Cell, dict[str, Any]] | None = None,
    pictures: dict[str, str] | None = None,
) -> int:
    """Train what a figure's sweeps lack; after each of them write results/SCRIPT.json and the pictures.

    Args:
        script: the caller's `__file__`.
        out: the one folder of all sweeps.
        commands: of onehour, each made once those before have ended.
        claims: what is promised of the figure, of its mean errors.
        entries: of earlier results, which stay where the folder has no more seeds; what is trained is added.
        pictures: names in docs/images of the report's figures.

    Returns:
        The code of the first command that did not end well, else 0.
    """
    claim(out, script)
    entries = {} if entries is None else entries
    given: list[str] = []
    for command in commands:
        if code := onehour(command):
            return code
        given.append(f"onehour {shlex.join(command)}")
        findings = findings_of(read_study([out]))
        rows = [described(row, "minibatch") for row in findings.sizes]
        rows += [described(row, group) for (_, group), arms in findings.groups.items() for row in arms]
        for row in rows:
            cell = row["arm"], row["minibatch"]
            if cell not in entries or row["n"] >= entries[cell]["n"]:
                entries[cell] = row | made_by()
        order = sorted(entries.values(), key=place)
        assert findings.study.recipe is not None
        recipe = findings.study.recipe.as_dict()
        held = claims({cell: entry["mean"] for cell, entry in entries.items()})
        write(script, Path(script).stem, {"commands": given, "recipe": recipe, "entries": order, "claims": held})
        for figure, picture in (pictures or {}).items():
            for kind in ("png", "svg"):
                shutil.copyfile(out / "figures" / f"{figure}.{kind}", IMAGES / f"{picture}.{kind}")
    return 0


def main() -> int:
    """Train what is missing, report it, write the results."""
    return draw_figure(__file__, OUT, [COMMAND], claims)


if __name__ == "__main__":
    sys.exit(main())

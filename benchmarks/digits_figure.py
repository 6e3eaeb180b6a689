"""The digits' figure: error against minibatch, arms, pitfalls and BatchNorm's n; what is promised of it, checked.

    make figure

Resumable: what runs/figure holds is not run again. Split 7 of the originals and seeds from 1000 on: no setting was ever
chosen on them. Writes results/digits_figure.json, of which docs/tables.py draws docs/images/figure.*.
"""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

from onehour.cli import main as onehour
from onehour.study.findings import Row, findings_of
from onehour.study.results import Study, read_study
from results import claim, write

OUT = Path("runs") / "figure"
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
        "difference": row.cost,
        "state": row.verdict.state if row.verdict else "reference",
        "verdict": row.verdict.text if row.verdict else "",
        "early_gap": None if math.isnan(row.early) else row.early,
        "seconds": row.mean_seconds,
        "errors": {str(result.seed): result.error for result in entry.results},
    }


def claims(study: Study) -> list[dict[str, Any]]:
    """What is promised of this figure, and whether it shows it."""
    flat = {entry.minibatch: entry.mean for entry in study.flat}
    arms = {entry.label: entry.mean for entry in study.arms}
    base, shown = flat[BASE], flat[SHOWN]
    return [
        _claim("8× within 0.7 points of 1×", abs(flat[8 * BASE] - base), "≤", 0.7),
        _claim("16× at most 1.0 point above 1×", shown - base, "≤", 1.0),
        _claim("no warmup at least 0.5 points above gradual", arms["warmup=none"] - shown, "≥", 0.5),
        _claim("constant warmup at least 5 points above gradual", arms["warmup=constant"] - shown, "≥", 5.0),
        _claim("a fixed rate at least 0.4 points above the linear rule", arms["scaling=fixed"] - shown, "≥", 0.4),
        _claim("a break by 64×", flat[64 * BASE] - base, "≥", 5.0),
    ]


def _claim(text: str, points: float, relation: str, bound: float) -> dict[str, Any]:
    holds = points <= bound if relation == "≤" else points >= bound
    return {"claim": text, "points": points, "relation": relation, "bound": bound, "holds": holds}


def main() -> int:
    """Train what is missing, report it, write the results."""
    claim(OUT, __file__)
    code = onehour(COMMAND)
    if code:
        return code
    findings = findings_of(read_study([OUT]))
    rows = [described(row, "minibatch") for row in findings.sizes]
    rows += [described(row, group) for (_, group), arms in findings.groups.items() for row in arms]
    assert findings.study.recipe is not None
    recipe = findings.study.recipe.as_dict()
    content = {
        "command": f"onehour {shlex.join(COMMAND)}",
        "recipe": recipe,
        "entries": rows,
        "claims": claims(findings.study),
    }
    write(__file__, "digits_figure", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())

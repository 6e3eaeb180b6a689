"""How wide can the rule's range be made on digits? Variants are tried on one split, the two widest measured on another.

    python benchmarks/digits_wide.py

Resumable: what runs/wide holds is not trained again (an hour on two cores). Writes results/digits_wide.json.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from onehour.cli import main as onehour
from onehour.study.results import read_study
from onehour.study.tables import Findings, findings_of
from results import write

OUT = Path("runs") / "wide"
VARIANTS = {
    "half the base rate": ["--base-lr", "0.1"],
    "four times the samples": ["--data", "digits-wide"],
    "four times the samples, half the base rate": ["--data", "digits-wide", "--base-lr", "0.1"],
    "four times the samples, a quarter of the base rate": ["--data", "digits-wide", "--base-lr", "0.05"],
}
TRIED = ["--minibatch", "32,512,1024,2048", "--seed", "2000", "--seeds", "3", "--seeds-together", "3"]
FINAL = ["--minibatch", "32,128,512,1024,2048", "--seed", "1000", "--seeds", "5", "--seeds-together", "5"]
SPLIT, FRESH = 6, 7


def measured(name: str, split: int, plan: list[str]) -> dict[str, Any]:
    """Train what is missing of a variant on a split; its command and what it shows."""
    flags = list(VARIANTS[name])
    if "--data" not in flags:
        flags += ["--data", "digits"]
    at = flags.index("--data") + 1
    flags[at] = f"{flags[at]}:{split}"
    out = OUT / f"{name.replace(' ', '-').replace(',', '')}-{split}"
    command = ["sweep", "digits", *flags, *plan, "--arm", "none", "--out", str(out)]
    code = onehour(command)
    if code:
        sys.exit(code)
    return {"command": f"onehour {shlex.join(command)}", "rows": described(findings_of(read_study([out])))}


def described(findings: Findings) -> list[dict[str, Any]]:
    """A variant's minibatches."""
    return [
        {
            "minibatch": row.entry.minibatch,
            "mean": row.entry.mean,
            "std": row.entry.std,
            "n": row.entry.n,
            "non_finite": row.non_finite,
            "difference": row.cost,
            "state": row.verdict.state if row.verdict else "reference",
            "verdict": row.verdict.text if row.verdict else "",
            "errors": {str(result.seed): result.error for result in row.entry.results},
        }
        for row in findings.sizes
    ]


def reach(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """How wide it is: its largest minibatch within half a point of its own base; then how little the next breaks."""
    beyond = [row for row in rows[1:] if row["difference"] > 0.5]
    within = [row["minibatch"] for row in rows if row not in beyond]
    return max(within), -min((row["difference"] for row in beyond), default=0.0)


def main() -> None:
    """Try all, then measure the two widest."""
    tried = {name: measured(name, SPLIT, TRIED) for name in VARIANTS}
    widest = sorted(tried, key=lambda name: reach(tried[name]["rows"]), reverse=True)[:2]
    write("digits_wide", {"tried": tried, "measured": {name: measured(name, FRESH, FINAL) for name in widest}})


if __name__ == "__main__":
    main()

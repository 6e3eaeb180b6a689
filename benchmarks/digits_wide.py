"""How far the rule holds on digits with four times the samples and a quarter of the base rate: claimed, then run.

    python benchmarks/digits_wide.py

Split 8 and seeds from 3000 on: nothing was ever chosen on them. The variant, the minibatches, the ten seeds and the
claims below were committed before the first run. Resumable: what runs/wide holds is not trained again (half an hour on
two quiet cores). Writes results/digits_wide.json.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from onehour.cli import main as onehour
from onehour.study.findings import Row, findings_of
from onehour.study.results import read_study
from results import claim, write

OUT = Path("runs") / "wide"
COMMAND = [
    *("sweep", "digits", "--data", "digits-wide:8", "--base-lr", "0.05", "--minibatch", "32,512,1024,2048"),
    *("--seed", "3000", "--seeds", "10", "--seeds-together", "5", "--arm", "none", "--out", str(OUT)),
]
HOLDS, BREAKS = 1024, 2048
"""It is claimed to hold at 32×, within half a point with 95 % confidence, and not to hold at 64×."""


def described(row: Row) -> dict[str, Any]:
    """A minibatch with every run."""
    return {
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


def main() -> int:
    """Train what is missing; say what was claimed and what was seen."""
    claim(OUT, __file__)
    code = onehour(COMMAND)
    if code:
        return code
    rows = [described(row) for row in findings_of(read_study([OUT])).sizes]
    states = {row["minibatch"]: row["state"] for row in rows}
    claims = [
        {"claim": f"it holds at {HOLDS}", "seen": states[HOLDS], "holds": states[HOLDS] == "within"},
        {"claim": f"it does not hold at {BREAKS}", "seen": states[BREAKS], "holds": states[BREAKS] != "within"},
    ]
    write(__file__, "digits_wide", {"command": f"onehour {shlex.join(COMMAND)}", "rows": rows, "claims": claims})
    return 0


if __name__ == "__main__":
    sys.exit(main())

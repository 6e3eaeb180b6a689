"""Adam's square-root rule on digits at 16 times the minibatch, and the rate alone beside it: claimed, then run.

    python benchmarks/adam_rule.py

AdamW on split 9 and seeds from 4000 on: nothing was ever chosen on them. The rate was chosen at the base minibatch on
other data (split 0, seed 0; of 0.002, 0.005, 0.01 and 0.02). The claim below was committed before the first run.
Resumable: what runs/adam holds is not trained again. Writes results/adam_rule.json.
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

OUT = Path("runs") / "adam"
COMMAND = [
    *("sweep", "digits", "--data", "digits:9", "--optimizer", "adamw", "--scaling", "sqrt", "--base-lr", "0.01"),
    *("--beta1", "0.95", "--weight-decay", "0.05", "--minibatch", "32,512", "--seed", "4000", "--seeds", "5"),
    *("--arm", "scale_betas=false", "--arms-at", "512", "--out", str(OUT)),
]


def described(row: Row, arm: str = "") -> dict[str, Any]:
    """A minibatch, or an arm at one, with every run."""
    return {
        "minibatch": row.entry.minibatch,
        "arm": arm,
        "mean": row.entry.mean,
        "std": row.entry.std,
        "n": row.entry.n,
        "non_finite": row.non_finite,
        "errors": {str(result.seed): result.error for result in row.entry.results},
    }


def main() -> int:
    """Train what is missing; say what was claimed and what was seen."""
    claim(OUT, __file__)
    code = onehour(COMMAND)
    if code:
        return code
    findings = findings_of(read_study([OUT]))
    rows = [described(row) for row in findings.sizes] + [described(row, arm=row.name) for row in findings.arms]
    whole, alone = (row["mean"] for row in rows if row["minibatch"] == 512)
    claims = [
        {
            "claim": "at 512 the whole rule ends no worse than the rate alone",
            "seen": f"{whole:.2f} and {alone:.2f} %",
            "holds": whole <= alone,
        }
    ]
    write(__file__, "adam_rule", {"command": f"onehour {shlex.join(COMMAND)}", "rows": rows, "claims": claims})
    return 0


if __name__ == "__main__":
    sys.exit(main())

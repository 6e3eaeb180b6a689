"""Ten jobs at once on one host: no two take the same port, all end, and all learn the same.

    python tests/faults/together.py [--cases 3]

Each case starts them within a second, on two processes each.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from starting import Started, cut, state
from summary import OUT, add, missing, report

CAMPAIGN = "together"
JOBS = 10
FLAGS = ("--processes", "2", "--epochs", "1", "--hang-timeout", "600")


def together(case: int, jobs: int = JOBS) -> dict[str, Any]:
    """Some jobs at once."""
    place = (OUT / f"{CAMPAIGN}-{os.getpid()}" / str(case)).absolute()
    cut(place)
    since = time.monotonic()
    runs = [Started(place / str(job), FLAGS) for job in range(jobs)]
    try:
        codes = [run.wait(900) for run in runs]
        seconds = time.monotonic() - since
        states = {tuple(sorted(state(run.folder).items())) for run, code in zip(runs, codes, strict=True) if code == 0}
        left = [pid for run in runs for pid in run.left()]
        ok = codes == [0] * jobs and len(states) == 1 and not left
        said = "" if ok else "\n".join(run.said()[-800:] for run, code in zip(runs, codes, strict=True) if code != 0)
        return {"ok": ok, "runs": jobs, "codes": codes, "states": len(states), "seconds": seconds, "said": said}
    finally:
        for run in runs:
            run.end()
        cut(place.parent)


def main() -> int:
    """Run what is missing; 1 if any case failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=3)
    options = parser.parse_args()
    ledger = OUT / f"{CAMPAIGN}.jsonl"
    for case in missing(ledger, CAMPAIGN, range(options.cases)):
        add(ledger, CAMPAIGN, case, **together(case))
    return report(ledger)


if __name__ == "__main__":
    sys.exit(main())

"""Ten jobs at once on one host: no two take the same port, all end, and all learn the same.

    python -m campaigns.together [--cases N]

Each case starts them within a second, on two processes each.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

from campaigns.ledger import run
from campaigns.starting import Started, emptied, state

CAMPAIGN = "together"
JOBS = 10
FLAGS = ("--processes", "2", "--epochs", "1", "--hang-timeout", "600")


def together(jobs: int = JOBS) -> dict[str, Any]:
    """Some jobs at once."""
    since = time.monotonic()
    with emptied(CAMPAIGN) as place, ExitStack() as stack:
        started = [stack.enter_context(Started(place / str(number), FLAGS)) for number in range(jobs)]
        codes = [job.wait(900) for job in started]
        seconds = time.monotonic() - since
        states = {tuple(state(job.folder).items()) for job, code in zip(started, codes, strict=True) if code == 0}
        ok = codes == [0] * jobs and len(states) == 1 and not any(job.left() for job in started)
        said = "" if ok else "\n".join(job.said()[-800:] for job, code in zip(started, codes, strict=True) if code != 0)
        return {"ok": ok, "runs": jobs, "codes": codes, "states": len(states), "seconds": seconds, "said": said}


if __name__ == "__main__":
    sys.exit(run(CAMPAIGN, ((CAMPAIGN, case, together) for case in range(3))))

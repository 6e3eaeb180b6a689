"""Signals at random moments to the launcher or any training process of a run, which is then started again.

    python -m campaigns.signals [--cases N] [--minutes M]

A run gets up to five signals at seeded moments, three in ten of them while it starts, the others while it trains,
evaluates and saves.
Every time it must leave with 75 within ten seconds and leave no process behind; what it says it has saved must be
there; and in the end its state must be, to the bit, that of a run that nobody disturbed. Every fifth signal is followed
by a second one, after which it must be gone within two seconds.
"""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from campaigns.ledger import run
from campaigns.starting import Started, emptied, ready, state, trainers, undisturbed

CAMPAIGN = "signals"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
EACH = 5
FIRST = 0.6
"""Seconds after which Python itself has started, and can listen."""
LIMIT = 10.0
BEGUN = "BatchNorm over"
SAVED = re.compile(r"stopped after iteration (\d+) and saved")


def flags_of(case: int, epochs: int) -> tuple[str, tuple[str, ...]]:
    """The name of the reference, and the flags."""
    processes = (2, 2, 2, 1, 4)[case % 5]
    return f"signals-{processes}-{epochs}", ("--processes", str(processes), "--epochs", str(epochs), "--restarts", "2")


def one(draw: random.Random, folder: Path, flags: tuple[str, ...], span: float) -> dict[str, Any]:
    """Start the command, signal it at a random moment, and see how it ends."""
    with Started(folder, flags) as started:
        number, twice, early, part = draw.choice(SIGNALS), draw.random() < 0.2, draw.random() < 0.3, draw.random()
        if not early:  # from the first iteration on
            ready(lambda: BEGUN in started.said() or started.process.poll() is not None)
        moment = FIRST + part * 0.5 * span if early else part * 0.2 * span
        about: dict[str, Any] = {"signal": number.name, "begun": not early, "at": round(moment, 2)}
        code = started.wait(moment)
        if code is None:
            at = draw.choice([started.pid, *trainers(started.pid)])
            about["to"] = "launcher" if at == started.pid else "process"
            sent = time.monotonic()
            with suppress(ProcessLookupError):  # the process ended while the launcher has not
                os.kill(at, number)
                if twice and started.wait(1.3) is None:
                    about["twice"] = True
                    os.kill(at, number)
            code = started.wait(60.0)
            about["seconds"] = round(time.monotonic() - sent, 2)
        said = started.said()
        about |= {"code": code, "wrong": fault(about, code, said, folder, started)}
        return about | ({"said": said[-1500:]} if about["wrong"] else {})


def fault(about: dict[str, Any], code: int | None, said: str, folder: Path, started: Started) -> str:
    """What is wrong with this end; "" for nothing."""
    if code is None:
        return "does not end"
    if about.get("seconds", 0.0) > LIMIT + (1.3 if about.get("twice") else 0.0):
        return "takes too long"
    if started.left():
        return "leaves a process behind"
    if "Traceback" in said:
        return "a traceback"
    if about.get("twice") and code >= 128:
        return ""
    if code not in (0, 75):
        return f"leaves with {code}"
    saved = SAVED.search(said)
    if code == 75 and saved is None and "before the first iteration" not in said:
        return "does not say what it saved"
    if saved and not (folder / "checkpoints" / f"iteration-{int(saved[1]):09d}" / "manifest.json").exists():
        return "says it saved what is not there"
    return ""


def disturbed(case: int, epochs: int = 4, each: int = EACH) -> dict[str, Any]:
    """A run that gets signals, and is brought to its end."""
    name, flags = flags_of(case, epochs)
    expected, seconds = undisturbed(name, *flags)
    draw = random.Random(f"{CAMPAIGN} {case}")
    ends: list[dict[str, Any]] = []
    with emptied(CAMPAIGN) as place:
        folder = place / "run"
        while len(ends) < each and not (ends and ends[-1]["code"] == 0):
            ends.append(one(draw, folder, flags, seconds))
        with Started(folder, flags) as last:
            equal = last.wait() == 0 and ready((folder / "summary.json").exists, 1) and state(folder) == expected
            wrong = [end["wrong"] for end in ends if end["wrong"]]
            wrong += [] if equal else [f"differs: {last.said()[-500:]}"]
    kinds = Counter(f"{end['signal']} to a {end['to']}" for end in ends if "to" in end)
    slowest = max((end.get("seconds", 0.0) for end in ends), default=0.0)
    about = {"runs": kinds.total(), "failures": len(wrong), "slowest": slowest, "ends": ends}
    return {"ok": not wrong, "said": "; ".join(wrong), "kinds": dict(kinds), **about}


if __name__ == "__main__":
    sys.exit(run(CAMPAIGN, ((CAMPAIGN, case, partial(disturbed, case)) for case in range(30))))

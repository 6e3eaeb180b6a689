"""Kill any process of a run at random moments, start the same command again, and compare with an undisturbed run.

    python -m campaigns.kills [--only NAME] [--minutes M]

The state's digest and the bytes of metrics.jsonl must be those of the undisturbed run: for canonical runs whatever the
numbers of processes were, for fast ones at a fixed number. Every second run has a loader process for each training
process, which changes no result. A moment is any between the start of the command and the end of an undisturbed run;
saves, evaluations and starts are killed as they fall. Cases of all scenarios take turns, so a ledger that was stopped
early has some of each.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from campaigns.ledger import run
from campaigns.starting import LOADED, Started, emptied, family, state, trainers, undisturbed

LENGTH = ("--epochs", "2", "--save-every", "4")
IN_MEMORY = ("--data", "tinytask:half_digits", "--classes", "10")
TIRED = 12
"""Starts after which a run that still has not ended counts as failed."""


@dataclass(frozen=True)
class Scenario:
    """Runs that are killed `kills` times each; `processes` of which one is drawn at every start, or a fixed number."""

    name: str
    reduce: str
    processes: tuple[int, ...]
    kills: int
    runs: int

    @property
    def campaign(self) -> str:
        """Its name in the ledger."""
        return f"kills: {self.name}"

    def flags(self, processes: int, *, loaded: bool) -> tuple[str, ...]:
        """Of a command of it."""
        data = LOADED if loaded else IN_MEMORY
        return (*LENGTH, *data, "--reduce", self.reduce, "--processes", str(processes))


SCENARIOS = [
    Scenario("canonical on 2, one kill", "canonical", (2,), 1, 50),
    Scenario("canonical on 4, one kill", "canonical", (4,), 1, 50),
    Scenario("fast on 2, one kill", "fast", (2,), 1, 50),
    Scenario("fast on 4, one kill", "fast", (4,), 1, 50),
    Scenario("fast on 2, three kills", "fast", (2,), 3, 15),
    Scenario("canonical on 2, three kills", "canonical", (2,), 3, 15),
    Scenario("canonical, p changes at each restart", "canonical", (1, 2, 3, 4), 3, 30),
]


def kill(started: Started, draw: random.Random) -> str:
    """Kill one of a run's processes; what it was, "" if it had ended."""
    victims, ranks = family(started.pid), trainers(started.pid)
    victim = draw.choice(victims)
    with suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
        return "launcher" if victim == started.pid else "trainer" if victim in ranks else "loader or helper"
    return ""


def reference(scenario: Scenario, processes: int, *, loaded: bool) -> tuple[dict[str, str], float]:
    """What a run of these flags ends with if nothing disturbs it, and its seconds; loaders change no weight."""
    name = f"kills-{scenario.reduce}-{processes}"
    plain = undisturbed(name, *scenario.flags(processes, loaded=False))
    if not loaded:
        return plain
    found = undisturbed(f"{name}-loaded", *scenario.flags(processes, loaded=True))
    assert found[0]["state"] == plain[0]["state"], "loaders change the weights"
    return found


def disturbed(scenario: Scenario, number: int) -> dict[str, Any]:
    """One run, killed at seeded random moments."""
    loaded = number % 2 == 1
    expected, _ = reference(scenario, scenario.processes[len(scenario.processes) // 2], loaded=loaded)
    draw = random.Random(f"{scenario.name} {number}")
    killed: list[dict[str, Any]] = []
    codes: list[int | None] = []
    left, said = 0, ""
    with emptied("kills") as place:
        folder = place / "run"
        while len(codes) < TIRED and codes[-1:] != [0]:
            processes = draw.choice(scenario.processes)
            _, seconds = reference(scenario, processes, loaded=loaded)
            with Started(folder, scenario.flags(processes, loaded=loaded)) as started:
                moment = draw.uniform(0, seconds)
                if len(killed) < scenario.kills and started.wait(moment) is None and (kind := kill(started, draw)):
                    at = {"at": round(moment, 2), "of": round(seconds, 2), "kind": kind, "processes": processes}
                    killed.append(at)
                codes.append(started.wait())
                said = started.said()
                left += len(started.left())
        found = state(folder) if (folder / "summary.json").exists() else {}
    wrong = [] if found == expected else [f"differs: {said[-2000:]}"]
    wrong += [f"{left} processes left"] if left else []
    kinds = {kind: sum(each["kind"] == kind for each in killed) for kind in sorted({each["kind"] for each in killed})}
    return {"ok": not wrong, "kinds": kinds, "killed": killed, "codes": codes, "said": "; ".join(wrong)}


if __name__ == "__main__":
    turns = ((scenario, number) for number in range(50) for scenario in SCENARIOS if number < scenario.runs)
    sys.exit(run("kills", ((each.campaign, number, partial(disturbed, each, number)) for each, number in turns)))

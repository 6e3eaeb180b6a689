"""Kill any process of a run at random moments, start the same command again, and compare with an undisturbed run.

    python tests/faults/kills.py [--only NAME] [--minutes M]

The state's digest and the bytes of metrics.jsonl must be those of the undisturbed run: for canonical runs whatever the
numbers of processes were, for fast ones at a fixed number. Resumable: what runs/faults/kills.jsonl has is not run
again. `make faults` writes benchmarks/results/faults.json from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OUT = Path("runs") / "faults"
TRAIN = [
    *("train", "digits", "--minibatch", "128", "--epochs", "3", "--warmup-epochs", "1"),
    *("--threads", "1", "--device", "cpu", "--save-every", "8"),
]
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
    def reference(self) -> str:
        """The undisturbed run that its runs must equal."""
        return self.reduce if self.reduce == "canonical" else f"{self.reduce}-{self.processes[0]}"


SCENARIOS = [
    Scenario("canonical on 2, one kill", "canonical", (2,), 1, 50),
    Scenario("canonical on 4, one kill", "canonical", (4,), 1, 50),
    Scenario("fast on 2, one kill", "fast", (2,), 1, 50),
    Scenario("fast on 4, one kill", "fast", (4,), 1, 50),
    Scenario("fast on 2, three kills", "fast", (2,), 3, 15),
    Scenario("canonical on 2, three kills", "canonical", (2,), 3, 15),
    Scenario("canonical, p changes at each restart", "canonical", (1, 2, 3, 4), 3, 30),
]


def command(folder: Path, reduce: str, processes: int) -> list[str]:
    """What a person would type."""
    flags = ["--reduce", reduce, "--processes", str(processes), "--out", str(folder)]
    return [sys.executable, "-m", "onehour", *TRAIN, *flags]


def family(pid: int) -> list[int]:
    """A process and everything below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def state(folder: Path) -> dict[str, str]:
    """What must be equal."""
    metrics = (folder / "metrics.jsonl").read_bytes()
    summary = json.loads((folder / "summary.json").read_text())
    return {"state": summary["state_sha256"], "metrics": hashlib.sha256(metrics).hexdigest()}


def undisturbed(scenario: Scenario) -> tuple[dict[str, str], float]:
    """The reference's state, and how long a run takes."""
    folder = OUT / "undisturbed" / scenario.reference
    took = folder / "seconds"
    if not took.exists():
        shutil.rmtree(folder, ignore_errors=True)
        started = time.monotonic()
        run = command(folder, scenario.reduce, scenario.processes[-1])
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        took.write_text(str(time.monotonic() - started))
    return state(folder), float(took.read_text())


def disturbed(scenario: Scenario, number: int) -> dict:
    """One run, killed at seeded random moments."""
    expected, seconds = undisturbed(scenario)
    draw = random.Random(f"{scenario.name} {number}")
    folder = OUT / "disturbed"
    shutil.rmtree(folder, ignore_errors=True)
    killed, codes, said = [], [], ""
    for start in range(TIRED):
        processes = draw.choice(scenario.processes)
        run = subprocess.Popen(
            command(folder, scenario.reduce, processes), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if start < scenario.kills:
            moment = draw.uniform(0, seconds)
            try:
                run.wait(moment)
            except subprocess.TimeoutExpired:
                victims = family(run.pid)
                victim = draw.choice(victims)
                try:
                    os.kill(victim, signal.SIGKILL)
                    killed.append({"at": moment, "launcher": victim == run.pid, "processes": processes})
                except ProcessLookupError:
                    pass
        _, said = run.communicate(timeout=300)
        codes.append(run.returncode)
        if run.returncode == 0:
            break
    left = [pid for pid in family(1) if str(folder).encode() in command_line(pid)]
    found = state(folder) if (folder / "summary.json").exists() else {}
    result = {"scenario": scenario.name, "number": number, "equal": found == expected, "killed": killed}
    return result | {"codes": codes, "left": len(left), "said": said[-2000:] if found != expected else ""}


def command_line(pid: int) -> bytes:
    """Of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def missing(only: str | None) -> Iterator[tuple[Scenario, int]]:
    """What was not run yet, a few of each scenario in turn."""
    path = OUT / "kills.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(line["scenario"], line["number"]) for line in map(json.loads, lines)}
    for number in range(max(scenario.runs for scenario in SCENARIOS)):
        for scenario in SCENARIOS:
            fits = only is None or only in scenario.name
            if fits and number < scenario.runs and (scenario.name, number) not in done:
                yield scenario, number


def main() -> int:
    """Run until all is done or the time is over; 1 if any run differed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="scenarios whose name has this in it")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--count", type=int, default=10**9)
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    until, failed = time.monotonic() + 60 * options.minutes, 0
    for count, (scenario, number) in enumerate(missing(options.only)):
        if time.monotonic() > until or count >= options.count:
            break
        result = disturbed(scenario, number)
        failed += not result["equal"] or result["left"] > 0
        with (OUT / "kills.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{scenario.name}, {number}: {'equal' if result['equal'] else 'DIFFERS'}, codes {result['codes']}",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

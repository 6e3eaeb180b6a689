"""Ctrl-C at random moments of every command: to its whole group, as of a terminal, and to its first process alone.

    python -m campaigns.interrupts [--cases N] [--minutes M]

From the moment on that a command listens, which is while Python still imports. One in four gets a second signal at
once. It must leave with 75, or with what it leaves with when it is done; within thirty seconds (machines are busy);
with one line of ours and no traceback; and leave neither a process, nor a temporary file, nor a file half written.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from campaigns.ledger import OUT, run
from campaigns.starting import ready

CAMPAIGN = "interrupts"
LIMIT = 30.0
SHORT = ("--epochs", "2", "--warmup", "none", "--threads", "1", "--device", "cpu")
CURVE = "epoch,error\n" + "".join(f"{epoch},{90 - epoch}\n" for epoch in range(1, 9))
LOOP = """
import torch
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(8):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(2, (16,))).backward()
    optimizer.step()
"""
COMMANDS: dict[str, tuple[str, ...]] = {
    "train": ("train", "digits", "--minibatch", "1024", *SHORT, "--out", "OUT"),
    "train on 2": ("train", "digits", "--minibatch", "1024", *SHORT, "--processes", "2", "--out", "OUT"),
    "train with loaders": (
        *("train", "resnet50", "--data", "images", "--model", "resnet8", "--minibatch", "8", "--per-worker", "4"),
        *("--loaders", "2", *SHORT, "--out", "OUT"),
    ),
    "plan": ("plan", "resnet50", "--minibatch", "8k"),
    "report": ("report", "a.csv", "b.csv", "--out", "OUT"),
    "evaluate": ("evaluate", "run"),
    "export": ("export", "run", "--to", "OUT/weights.pt"),
    "verify": ("verify", "digits", "--processes", "1,2", "--steps", "2"),
    "sweep": (
        *("sweep", "digits", "--minibatch", "1024", "--epochs", "1", "--warmup", "none", "--seeds", "2"),
        *("--arm", "none", "--jobs", "2", "--seeds-together", "1", "--device", "cpu", "--out", "OUT"),
    ),
    "check": ("check", "loop.py"),
    "index": ("data", "index", "images", "--digests", "--jobs", "2", "--out", "OUT/onehour.index"),
    "pack": ("data", "pack", "images", "OUT", "--jobs", "2"),
    "doctor": ("data", "doctor", "images", "--jobs", "2"),
}
DONE = (0, 1)
"""Codes of a command that was done before the signal; 1 is that of findings."""


def prepared(name: str) -> Path:
    """The inputs of a command, made once: two curves, images, a loop; a run where it wants one."""
    root = (OUT / CAMPAIGN / "inputs").absolute()
    if not (root / "loop.py").exists():
        furnish(root)
    if "run" in COMMANDS[name] and not (root / "run" / "summary.json").exists():
        subprocess.run(command_of("train", root / "run"), cwd=root, check=True, capture_output=True)
    return root


def furnish(root: Path) -> None:
    """Whatever takes no training."""
    shutil.rmtree(root, ignore_errors=True)
    draw = np.random.default_rng(0)
    for side, count in (("train", 24), ("val", 8)):
        for name in ("a", "b"):
            (root / "images" / side / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 255, (160, 160, 3), np.uint8)
                Image.fromarray(pixels).save(root / "images" / side / name / f"{number}.jpg")
    for name in ("a.csv", "b.csv"):
        (root / name).write_text(CURVE)
    (root / "loop.py").write_text(LOOP)


def command_of(name: str, out: Path) -> list[str]:
    """As a person types it."""
    return [sys.executable, "-m", "onehour", *(part.replace("OUT", str(out)) for part in COMMANDS[name])]


def listens(pid: int) -> bool:
    """Whether a process catches SIGTERM, as ours do from their first lines on and Python does not."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    caught = next((line for line in text.splitlines() if line.startswith("SigCgt")), "SigCgt: 0").split()[1]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1) or "State:\tZ" in text


@dataclass
class Tried:
    """A command that was started in a folder of its own, in a session of its own."""

    name: str
    root: Path
    place: Path

    def __post_init__(self) -> None:
        (self.place / "tmp").mkdir(parents=True, exist_ok=True)
        (self.place / "out").mkdir(exist_ok=True)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        self.process = subprocess.Popen(
            command_of(self.name, self.place / "out"),
            cwd=self.root,
            env=os.environ | {"TMPDIR": str(self.place / "tmp")},
            stdout=self._said,
            stderr=self._said,
            start_new_session=True,
        )

    def ended(self, seconds: float) -> bool:
        """Whether it ends in time."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def said(self) -> str:
        """Both its streams."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def left(self) -> list[str]:
        """Its processes that are there still, by their commands; they have two seconds to go."""
        ready(lambda: not self._others(), 2)
        return [Path(f"/proc/{pid}/cmdline").read_text(errors="replace")[:80] for pid in self._others()]

    def _others(self) -> list[int]:
        """Those of its session, and those that were started elsewhere from it and have its folder in their names."""
        found, text = [], str(self.place).encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                own = int(fields[3]) == self.process.pid or text in (path / "environ").read_bytes()
            except OSError:
                continue
            if own and fields[0] != "Z":
                found.append(int(path.name))
        return found

    def end(self) -> None:
        """Kill what is left."""
        for pid in self._others():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._said.close()


def interrupted(case: int, span: float | None = None) -> dict[str, Any]:
    """A command that is interrupted at a random moment, and how it ended.

    Args:
        span: seconds in which the signal comes; None is as long as the command takes, measured once.
    """
    name = list(COMMANDS)[case % len(COMMANDS)]
    root, draw = prepared(name), random.Random(f"{CAMPAIGN} {case}")
    place = (OUT / CAMPAIGN / f"case-{case}").absolute()
    shutil.rmtree(place, ignore_errors=True)
    moment = draw.random() * (seconds_of(name, root) if span is None else span)
    whole, twice = draw.random() < 0.5, draw.random() < 0.25
    tried = Tried(name, root, place)
    try:
        ready(lambda: listens(tried.process.pid), 30)
        done = tried.ended(moment)
        started = time.monotonic()
        for pause in (0.1, 0.0)[1 - twice :]:
            if not done:
                (os.killpg if whole else os.kill)(tried.process.pid, signal.SIGINT)
            time.sleep(pause)
        in_time = tried.ended(60.0)
        about = {
            "kind": f"{name}{': its group' if whole else ''}",
            "at": round(moment, 2),
            "twice": twice,
            "code": tried.process.returncode,
            "slowest": round(time.monotonic() - started, 2),
        }
        wrong = "does not end" if not in_time else fault(tried, done, about)
        return {"ok": not wrong, **about} | ({"said": f"{wrong}: {tried.said()[-900:]}"} if wrong else {})
    finally:
        tried.end()
        shutil.rmtree(place, ignore_errors=True)


def fault(tried: Tried, done: bool, about: dict[str, Any]) -> str:
    """What is wrong with this end; "" for nothing."""
    said, code = tried.said(), about["code"]
    if "Traceback" in said or "Exception ignored" in said:
        return "a traceback"
    if code not in (75, *DONE) or (done and code == 75):
        return f"leaves with {code}"
    ours = [line for line in said.splitlines() if line.startswith("onehour: ")]
    if code == 75 and (len(ours) != 1 or "stopped" not in ours[0]):
        return f"says {len(ours)} lines"
    if about["slowest"] > LIMIT:
        return "takes too long"
    if left := tried.left():
        return f"leaves processes behind: {left}"
    if left := [path.name for path in (tried.place / "tmp").iterdir() if not path.name.startswith("torchinductor")]:
        return f"leaves temporary files behind: {left}"
    return half_written(tried.place / "out")


def half_written(out: Path) -> str:
    """A file that cannot be read, or a report without a part of it; "" for none."""
    for path in out.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except ValueError as error:
            return f"{path.name} is half written: {error}"
    parts = [(out / name).exists() for name in ("report.html", "results.json", "results.csv")]
    if any(parts) and not all(parts):
        return f"a part of a report: {parts}"
    return ""


def seconds_of(name: str, root: Path) -> float:
    """How long a command takes from the moment on that it listens, measured once."""
    path = OUT / CAMPAIGN / "seconds.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if name not in known:
        place = (OUT / CAMPAIGN / "measured").absolute()
        tried = Tried(name, root, place)
        ready(lambda: listens(tried.process.pid), 30)
        started = time.monotonic()
        if not tried.ended(300) or tried.process.returncode not in DONE:
            raise AssertionError(tried.said())
        known[name] = time.monotonic() - started
        tried.end()
        shutil.rmtree(place)
        path.write_text(json.dumps(known))
    return known[name]


if __name__ == "__main__":
    sys.exit(run(CAMPAIGN, ((CAMPAIGN, case, partial(interrupted, case)) for case in range(120))))

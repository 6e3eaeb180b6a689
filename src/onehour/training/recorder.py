"""A run's folder while it trains: where it goes on, what is written into it, and that all processes see it."""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from onehour.config import Recipe
from onehour.dist.devices import out_of_memory
from onehour.dist.group import Group
from onehour.dist.launched import JOB
from onehour.files import append_whole, remove, replace_whole, sync_folder, to_json
from onehour.lock import FolderLostError, HeldFolder
from onehour.machine import cores
from onehour.noise import FEWEST, noise_scale
from onehour.sidefile import read_lines
from onehour.training.checkpoint import Checkpoints, Progress, checkpoint_folders
from onehour.training.console import Console, Loggers, load_logger
from onehour.training.measure import NOT_FINITE, Metrics
from onehour.training.record import (
    BAD_IMAGES,
    MEDIAN_OF,
    METRICS,
    OUTCOME,
    PARTS,
    RECIPE,
    Run,
    final_error,
    finished_run,
    sessions_of,
)
from onehour.training.state import Network, digest_of

LINES = ("metrics.jsonl", "timing.jsonl")
TOKEN = ".seen-"
PATIENCE = 10.0
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
"""What a disk says that takes nothing."""
BOTTLENECKS = {
    "data": "waiting for data",
    "compute": "forward and backward",
    "reduction": "waiting for the reduction",
    "update": "the update",
}


class RunFolder:
    """A run's folder as its training uses it: process 0 alone writes, and what all must know is told to all.

    It writes `inside` the very folder whose lock it took. One that was moved is written to its end under the new name,
    since its lock is held still; one that was removed, or that another process may write, never again.
    """

    def __init__(self, folder: Path, recipe: Recipe, group: Group, *, console: Console, log: str | None = None) -> None:
        self.folder, self.recipe, self.group, self.console = folder, recipe, group, console
        self._loggers = Loggers(load_logger(log) if group.rank == 0 else None)
        self._held = take_folder(folder, recipe, warn=console.warn) if group.rank == 0 else None
        self.inside = self._held.inside if self._held is not None else folder
        """A path to the very folder that process 0 holds; its name in the others."""
        self.checkpoints = Checkpoints(folder, recipe, group, warn=self._warn_of_disk, inside=self.inside)
        self.lost: FolderLostError | None = None
        """What became of the folder, which process 0 finds where it writes; it then asks all for a stop."""
        self.ended = False
        """Whether its summary is written."""
        self._together: dict[str, int] = {}
        self._late = dict.fromkeys(LINES, "")

    def load(self, part: Network, build: dict[str, str]) -> Progress | None:
        """Load the newest checkpoint, on every process; None where there is none."""
        found = self.checkpoints.load(part)
        if found is None:
            return None
        progress = Progress(**found)
        if self.recipe.reduce == "canonical" and progress.build != build:
            differs = [key for key in build if progress.build.get(key) != build[key]]
            changed = ", ".join(f"{key} {progress.build.get(key)} → {build[key]}" for key in differs)
            self.console.warn(f"the bits may differ from those of an uninterrupted run from here on: {changed}")
        return progress

    def begin(
        self, progress: Progress | None, environment: Callable[[], dict[str, Any]], *, together: int | None = None
    ) -> None:
        """Note where the run goes on, and cut the record to what the checkpoint there knows.

        Args:
            together: how many seeds train as one network, for the summary.
        """
        self._together = {} if together is None else {"seeds_together": together}
        if self._held is None:
            return
        start = 0 if progress is None else progress.iteration
        last = -1 if progress is None else start if progress.evaluated else start - 1
        files: dict[str, str] = {}
        for name, head in zip(LINES, ([to_json({"recipe": self.recipe.as_dict()})], []), strict=True):
            lines = read_lines(self.folder / name, {"iteration": METRICS["iteration"]})
            kept = [to_json(line) for line in lines if line.get("iteration", last + 1) <= last]
            files[name] = "".join(line + "\n" for line in [*head, *kept])
        path = self.folder / "environment.json"
        sessions = sessions_of(path) if path.is_file() else []
        sessions.append({"from_iteration": start, "began": time.time(), **environment()})
        files[path.name] = json.dumps({"sessions": sessions}, indent=2)
        self._check()  # what was read by the folder's name is this folder's
        self._write(files)
        for name in ("summary.json", OUTCOME):
            remove(self.inside, name)
        sync_folder(self.inside)
        self._loggers.tell("start", self.recipe.as_dict(), self.folder)

    def is_ours(self) -> bool:
        """Look at the folder; whether this process may write there."""
        if self._held is None:
            return False
        try:
            self._check()
        except FolderLostError as error:
            self.lost = error
        return self.lost is None or self.lost.now is not None

    def add(self, metrics: Metrics, timing: dict[str, Any]) -> None:
        """Record an evaluation; what the disk refuses is kept, to be written before the next checkpoint is."""
        if metrics.val_loss is None:
            self.console.warn(NOT_FINITE)
        if self._held is not None:
            for name, record in zip(LINES, (metrics.as_dict(), timing), strict=True):
                self._late[name] += to_json(record) + "\n"
            with suppress(OSError, FolderLostError):
                self._write_late()
            self._loggers.tell("log", metrics.as_dict() | {"images_per_second": timing["images_per_second"]})
        self.console.evaluated(metrics, timing["images_per_second"])

    def save(self, part: Network, progress: Progress) -> None:
        """Write a checkpoint in the background, behind the record that it counts on."""
        if self.is_ours():
            self.checkpoints.save(part, progress.as_dict(), first=self._catch_up)

    def is_saved(self) -> bool:
        """Whether process 0 has saved; nobody leaves before: launchers end the others once one has left."""
        return bool(self.group.broadcast(b"saved" if self.checkpoints.wait() and self.is_ours() else b""))

    def end(self, part: Network, outcome: str, **more: int) -> None:
        """Write the summary, once the last checkpoint is on disk; all processes call it together."""
        saved, usable = self.checkpoints.wait(), self.is_ours()
        if not saved and outcome == "finished" and self.lost is None:
            raise ValueError(f"the run has finished, but its weights could not be saved to {self.folder}")
        self.ended = True
        if usable:
            summary = summarise(self.inside, self.recipe, part, outcome) | more | self._together
            self._write({"summary.json": to_json(summary, indent=2) + "\n"})
            self._loggers.tell("finish", summary)
        self.leave(f"the run ended as {outcome}{'' if saved and usable else ', which is not saved'}")

    def note(self, outcome: str, message: str) -> None:
        """Write outcome.json: this job's processes end on purpose, which no launcher's restart may undo."""
        if self._held is not None:
            content = {"outcome": outcome, "message": message, "job": os.environ.get(JOB)}
            with suppress(OSError):  # a restart then goes on, which is better than a message that hides this one
                replace_whole(self.inside, OUTCOME, to_json(content) + "\n")

    def leave(self, how: str) -> None:
        """Have all processes end, if process 0 has lost its folder; all call it together.

        Raises:
            FolderLostError: in each of them, with what became of the folder and how to go on.
        """
        said = self.group.broadcast(self.lost.ended(how).encode() if self.lost is not None else b"")
        if said:
            raise FolderLostError(said.decode(), now=self.lost.now if self.lost is not None else None)

    def close(self) -> None:
        """Wait for what is being written, and let others write the folder."""
        with ExitStack() as stack:
            if self._held is not None:
                stack.callback(self._held.release)
            stack.callback(self.console.close)
            stack.callback(self.checkpoints.close)

    def _check(self) -> None:
        """See whether the folder is this run's still, before it is written."""
        assert self._held is not None
        self._held.check()
        if not (self.inside / RECIPE).exists():
            text = f"{self.folder / RECIPE} was removed while the run wrote its folder"
            raise FolderLostError(text, "the same command goes on from the checkpoints that are left")

    def _write(self, files: Mapping[str, str]) -> None:
        try:
            for name, text in files.items():
                replace_whole(self.inside, name, text)
        except OSError:
            self._check()  # which has more to say
            raise

    def _write_late(self) -> None:
        try:
            self._check()
        except FolderLostError as error:
            if error.now is None:
                raise
        for name, text in self._late.items():
            if text:
                append_whole(self.inside, name, text.encode())
                self._late[name] = ""

    def _catch_up(self) -> None:
        """Write what the disk has refused, and bring the record to disk: a checkpoint is about to count on it."""
        self._write_late()
        for name in (*LINES, BAD_IMAGES, "."):
            with suppress(FileNotFoundError):  # there is none, or somebody removed it: nothing counts on it any more
                sync_folder(self.inside / name)

    def _warn_of_disk(self, text: str) -> None:
        if self.is_ours():  # else there is more to say than that a checkpoint could not be written
            self.console.warn(text)


def has_begun(folder: Path, group: Group) -> bool:
    """Whether a run has a checkpoint, and needs no initial weights; process 0 looks, and all hear it."""
    try:
        begun = group.rank == 0 and bool(checkpoint_folders(folder))
    except (ValueError, OSError):  # which whoever loads it has more to say of
        begun = False
    return bool(group.broadcast(b"begun" if begun else b""))


def take_folder(folder: Path, recipe: Recipe, *, warn: Callable[[str], None]) -> HeldFolder:
    """Hold a folder that is new, empty, or of the same recipe, which is written there.

    Raises:
        ValueError: if the folder is another recipe's (differences listed) or something else's, if another process
            writes it, or has just trained it to its end.
    """
    before = finished_run(folder, recipe)  # refuses what is not this recipe's
    held = HeldFolder(folder)
    try:
        if finished_run(folder, recipe) is not None and before is None:  # who had the lock may have changed it
            raise ValueError(f"another process has just trained {folder} to its end; the same command shows how")
        if checkpoint_folders(held.inside) and not (held.inside / RECIPE).is_file():
            warn(f"{folder} had lost its {RECIPE}: written again, as its checkpoints are of this recipe")
        replace_whole(held.inside, RECIPE, recipe.to_toml())
    except BaseException:
        held.release()
        raise
    return held


@contextmanager
def in_words(folder: Path, per_pass: int = 1, *, canonical: bool = False) -> Generator[None]:
    """Turn what a device or a disk refuses in the middle of a run into one message.

    Args:
        per_pass: workers in a pass, of which fewer need less memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        if per_pass > 1:
            flag, fewer, means = "workers-per-pass", per_pass // 2, "changes nothing that the run learns"
            if canonical:
                flag, means = "canonical-pass", "is part of the run's bits: begin it anew with --fresh"
                fewer = max(size for size in range(1, per_pass) if per_pass % size == 0)
            raise ValueError(
                f"out of memory with {per_pass} workers in a pass; give --{flag} {fewer}, which {means}"
            ) from error
        raise ValueError(
            "out of memory with one worker in a pass; use --precision bf16, or a smaller --per-worker (which changes"
            " what BatchNorm sees, and so the loss)"
        ) from error
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise ValueError(
            f"{folder} cannot be written: {error.strerror}; the same command goes on once it can"
        ) from error


def look_for_folder(folder: Path, group: Group, *, patience: float = PATIENCE, inside: Path | None = None) -> None:
    """Process 0 writes a token, the others look for it; all processes call it together.

    Args:
        patience: seconds that a file system may take to show one host what another one has written.

    Raises:
        ValueError: naming both hosts, if some host does not see the folder. After a failure its process may be 0, would
            find no checkpoint and begin again.
    """
    if group.size == 1:
        return
    token = Path(inside or folder, f"{TOKEN}{uuid.uuid4().hex}")
    if group.rank == 0:
        for old in token.parent.glob(f"{TOKEN}*"):
            old.unlink(missing_ok=True)
        token.touch()
    sent = group.broadcast(token.name.encode() if group.rank == 0 else None)
    assert sent is not None
    seen = {"seen": _appears(folder, sent.decode(), patience), "host": socket.gethostname()}
    rows = [json.loads(row) for row in group.gather(json.dumps(seen).encode())]
    if group.rank == 0:
        token.unlink(missing_ok=True)
    blind = [rank for rank, row in enumerate(rows) if not row["seen"]]
    if blind:
        raise ValueError(
            f"{folder} is not shared: process {blind[0]} on {rows[blind[0]]['host']} does not see what process 0 on"
            f" {rows[0]['host']} writes there; give --out on a file system that all hosts share"
        )


def _appears(folder: Path, token: str, patience: float) -> bool:
    """Whether a file is there, or comes. Opening the folder asks a network file system for its present state."""
    deadline = time.monotonic() + patience
    while True:
        with suppress(OSError):
            if token in os.listdir(folder):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def summarise(folder: Path, recipe: Recipe, part: Network, outcome: str) -> dict[str, Any]:
    """summary.json from the run's records and its final state: error, speed, what it waited for, digests."""
    run = Run(folder)
    metrics, timing = run.metrics, run.timing
    errors = [record["top1_error"] for record in metrics]
    seconds = sum(line["seconds"] for line in timing)
    steps = np.array([step for line in timing for step in line["steps_ms"]]).reshape(-1, len(PARTS))
    mean_ms = dict(zip(PARTS, steps.mean(0).tolist() if len(steps) else [0.0] * len(PARTS), strict=True))
    weights, kept = part.state()
    averaged = [record["ema_top1_error"] for record in metrics if "ema_top1_error" in record]
    return {
        "outcome": outcome,
        "recipe": recipe.name,
        "minibatch": recipe.minibatch,
        "seed": recipe.seed,
        "final_error": run.final_error if outcome == "finished" else None,
        **({"ema_final_error": final_error(averaged)} if averaged else {}),
        "last_errors": errors[-MEDIAN_OF:],
        "epochs": metrics[-1]["epoch"] if metrics else 0,
        "iterations": metrics[-1]["iteration"] if metrics else 0,
        "images_per_second": sum(line["images"] for line in timing) / seconds if seconds else None,
        "seconds_training": seconds,
        "seconds_evaluating": sum(line["evaluate_seconds"] for line in timing),
        "step_ms": mean_ms,
        "bottleneck": BOTTLENECKS[max(mean_ms, key=mean_ms.__getitem__)],
        "weights_sha256": digest_of(weights),
        "state_sha256": digest_of(weights, kept),
        **_sizes(part, kept),
        **_noise(run),
    }


def _noise(run: Run) -> dict[str, Any]:
    """The noise scale and its interval, of a run that measured some."""
    points = [(trace, square) for _, trace, square in run.noise]
    if len(points) < FEWEST:
        return {}
    noise = noise_scale(points)
    return {"noise_scale": noise.scale, "noise_scale_low": noise.low, "noise_scale_high": noise.high}


def _sizes(part: Network, kept: dict[str, Tensor]) -> dict[str, Any]:
    def described(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Any]:
        return {
            name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "bytes": t.nbytes}
            for name, t in tensors
        }

    model, averages = part.model, {} if part.average is None else part.average.state()
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameter_bytes": sum(p.nbytes for p in model.parameters()),
        "buffer_bytes": sum(b.nbytes for b in model.buffers()),
        "optimizer_bytes": sum(t.nbytes for name, t in kept.items() if name not in averages),
        "parameter_tensors": described(model.named_parameters()),
        "buffer_tensors": described(model.named_buffers()),
    }


def environment(execution: dict[str, Any]) -> dict[str, Any]:
    """What a result may depend on outside the recipe, for a session's line of environment.json."""
    import onehour

    return {
        "command": sys.argv,
        "commit": _commit(),
        "onehour": onehour.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        **execution,
    }


def _commit() -> str | None:
    """Of the repository that the command was given in, if it was in one."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

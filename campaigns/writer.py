"""A process that saves in a loop is killed at random moments; the next start finds a whole checkpoint, and no rest.

    python -m campaigns.writer [--cases N]

After every SIGKILL the newest checkpoint that verifies must load without a warning, be what was saved at its iteration,
and be at most one save behind; every folder with a checkpoint's name must verify; nothing else may be left. The same
folder goes on from kill to kill. Resumable: what runs/faults/writer.jsonl has is not run again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from campaigns.ledger import OUT, run
from onehour import Recipe
from onehour.dist.group import Group
from onehour.training.checkpoint import Checkpoints
from onehour.training.state import Network, digest_of, optimizer_state

CAMPAIGN = "writer"
RECIPE = Recipe()
SLOWEST = 0.3
"""Seconds from a process's first save to its end, at most: a few saves' time."""


def fresh(width: int = 96) -> tuple[nn.Module, Optimizer]:
    """A small network with statistics, and its optimizer with velocity."""
    model = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return model, optimizer


@torch.no_grad()
def fill(model: nn.Module, optimizer: Optimizer, iteration: int) -> None:
    """The state after an iteration: a function of its number."""
    draw = torch.Generator().manual_seed(iteration)
    for tensor in [*model.state_dict().values(), *optimizer_state(optimizer, model).values()]:
        if tensor.is_floating_point():
            tensor.uniform_(generator=draw)
        else:
            tensor.fill_(iteration)


def digest(model: nn.Module, optimizer: Optimizer) -> str:
    """Of a whole state."""
    return digest_of(*Network(model, optimizer).state())


def expected(iteration: int, width: int = 96) -> str:
    """The digest of the state after an iteration."""
    state = fresh(width)
    fill(*state, iteration)
    return digest(*state)


def progress_of(iteration: int) -> dict[str, Any]:
    """What a run keeps beside its tensors."""
    return {
        "iteration": iteration,
        "position": 8 * iteration,
        "totals": [0.5 * iteration, 2.0],
        "build": {"torch": "2"},
    }


def save_for_ever(folder: Path, tell: int) -> None:
    """Resume, then save iteration after iteration; each number that is told was handed over, and the one before it is
    on disk."""
    model, optimizer = fresh()
    checkpoints = Checkpoints(folder, RECIPE, Group(), warn=print)
    network = Network(model, optimizer)
    found = checkpoints.load(network)
    iteration = found["iteration"] if found else 1  # the same one again at first, as after an evaluation
    while True:
        fill(model, optimizer, iteration)
        checkpoints.save(network, progress_of(iteration))
        os.write(tell, b"%d\n" % iteration)
        network.finish_copy()
        iteration += 1


def killed(folder: Path, moment: float) -> int:
    """Start a process that saves, kill it `moment` seconds later; the last number that it told, or 0."""
    here, there = os.pipe()
    child = os.fork()  # not a new interpreter: importing torch would take 2 s each time
    if child == 0:
        try:
            os.close(here)
            save_for_ever(folder, there)
        finally:
            os._exit(1)
    os.close(there)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(here, "rb") as told:
        numbers = told.read().split()
    return int(numbers[-1]) if numbers else 0


def where(folder: Path) -> str:
    """What the kill interrupted, by what it left."""
    names = os.listdir(folder / "checkpoints") if (folder / "checkpoints").exists() else []
    kinds = ((".replaced-", "while replacing"), (".writing-", "while writing"), (".dropping-", "while removing"))
    for prefix, kind in kinds:
        for name in names:
            if name.startswith(prefix):
                whole = (folder / "checkpoints" / name / "manifest.json").exists()
                return "before the rename" if whole and kind == "while writing" else kind
    return "between saves"


def wrong(folder: Path, told: int, before: int) -> str:
    """What the next start would find wrong; empty if nothing."""
    said: list[str] = []
    state = fresh()
    checkpoints = Checkpoints(folder, RECIPE, Group(), warn=said.append)
    found = checkpoints.load(Network(*state))
    names = sorted(os.listdir(checkpoints.store.folder)) if checkpoints.store.folder.exists() else []
    iteration = found["iteration"] if found else 0
    if said:
        return f"warned: {said}"
    if iteration < max(told - 1, before):
        return f"iteration {told} was handed over, {before} was there before, and {iteration} is found"
    if found is not None and (digest(*state) != expected(iteration) or found != progress_of(iteration)):
        return f"iteration {iteration} is not what was saved"
    thinned = told >= before + 3  # by the first of two saves; one that is killed before it thins leaves it to the next
    most = checkpoints.store.kept + 1 if thinned else len(names)
    if any(not name.startswith("iteration-") for name in names) or len(names) > most:
        return f"left over: {names}"
    for name in names:
        checkpoints.store.verified(checkpoints.store.folder / name)
    return ""


def attempt(folder: Path, case: int) -> dict[str, Any]:
    """One kill, and what was found after it."""
    before = last(folder)
    moment = random.Random(f"{CAMPAIGN} {case}").uniform(0, SLOWEST)
    told = killed(folder, moment)
    kind = where(folder)
    try:
        said = wrong(folder, told, before)
    except ValueError as error:
        said = str(error)
    return {"ok": not said, "said": said, "kind": kind, "moment": round(moment, 4), "told": told}


def last(folder: Path) -> int:
    """The newest checkpoint's iteration by its name."""
    names = [path.name for path in (folder / "checkpoints").glob("iteration-*")]
    return max((int(name.rpartition("-")[2]) for name in names), default=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    where_to = OUT / CAMPAIGN
    shutil.rmtree(where_to, ignore_errors=True)
    sys.exit(run(CAMPAIGN, ((CAMPAIGN, case, partial(attempt, where_to, case)) for case in range(500))))

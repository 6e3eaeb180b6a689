"""For test suites: a training script, or a loop inside a test, that must be clean."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onehour.check.case import Base, Case
from onehour.check.finding import Finding
from onehour.check.judge import (
    ON_SEVERAL,
    PITFALLS,
    Note,
    as_table,
    judge,
    not_judged,
    not_silenced,
    refuse_unknown,
    shortened,
    worst_first,
)
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.check.story import Story
from onehour.check.tape import GroupJoined, ProcessStarted, Tape
from onehour.leaving import scratch

PROCESSES = 2
SEVERAL = re.compile(
    r"torch\.distributed|init_process_group|DistributedDataParallel|DistributedSampler|WORLD_SIZE|LOCAL_RANK"
    r"|[\"']RANK[\"']|\b(?:import|from) (?:accelerate|deepspeed|ignite|lightning|mmengine|onehour|pytorch_lightning"
    r"|transformers|torch import distributed)"
)
"""What a script that is made for several processes mentions."""


@dataclass
class Checked:
    """What a script's check came to.

    Args:
        findings: worst first.
        notes: what could not be judged, and why.
        stories: of the last run, by rank.
    """

    findings: list[Finding]
    notes: list[Note] = field(default_factory=list[Note])
    stories: list[Story] = field(default_factory=list)


def check_script(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    base: Base | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    strict: bool = False,
    limit: float = 120.0,
    forkserver: ForkServer | None = None,
    cwd: str | Path | None = None,
) -> Checked:
    """Run a script, unedited, and judge what was seen.

    Args:
        script: a Python file.
        arguments: its own.
        base: the recipe that it was scaled from.
        only, skip: ids of pitfalls.
        strict: whether notes say of every pitfall that it was not judged, for want of a base too.
        limit: seconds for each run.
        forkserver: to run it in; None starts one.
        cwd: the folder to run it in; None is this one.

    Raises:
        CheckError: if it could not be run, or never stepped an optimizer.
    """
    path = Path(cwd or ".", script).resolve()
    if not path.is_file():
        raise CheckError(f"there is no script {script}")
    refuse_unknown([*only, *skip])
    if forkserver is None:
        with ForkServer() as forkserver:
            return check_script(
                script,
                arguments,
                base=base,
                only=only,
                skip=skip,
                strict=strict,
                limit=limit,
                forkserver=forkserver,
                cwd=cwd,
            )
    with scratch("onehour-check-") as folder:
        request = {"script": str(path), "arguments": list(arguments), "cwd": str(Path(cwd or os.getcwd()).resolve())}
        runs = _ScriptRuns(forkserver, request | {"limit": limit}, folder)
        checked = _judged(runs, base, only=only, skip=skip, strict=strict)
        checked.findings = not_silenced(checked.findings)
        return checked


def _judged(runs: _ScriptRuns, base: Base | None, *, only: Sequence[str], skip: Sequence[str], strict: bool) -> Checked:
    """On one process, and on two if the script is made for several; what both show is said once."""
    wants = wants_processes(Path(runs.request["script"]))
    checked = Checked([])
    failed: CheckError | None = None
    alone: Story | None = None
    try:
        (alone,) = checked.stories = runs.observe(1, launched=wants)
        checked.findings = judge(Case([alone], base), only=only, skip=skip)
    except CheckError as error:
        failed = error
        if not wants:
            raise
    if alone is None or wants or any(alone.tape.of(GroupJoined)):
        stories = _several(runs, checked, failed)
        if stories:
            known = {finding.pitfall for finding in checked.findings}
            more = judge(Case(stories, base, alone), only=only, skip=skip)
            checked.findings += [finding for finding in more if finding.pitfall not in known]
            checked.findings = worst_first(checked.findings)
            checked.stories = stories
    checked.notes += not_judged(Case(checked.stories, base, alone), PITFALLS if strict else only)
    return checked


def _several(runs: _ScriptRuns, checked: Checked, failed: CheckError | None) -> list[Story]:
    """The stories of several processes; none where the script turns out not to be for them."""
    try:
        stories = runs.observe(PROCESSES, launched=True)
    except CheckError as error:
        if failed is not None:
            raise failed from error
        checked.notes.append(Note(f"it could not be checked on {PROCESSES} processes: {error}", *ON_SEVERAL))
        return []
    if all(any(story.tape.of(GroupJoined)) for story in stories):
        return stories
    if failed is not None:
        raise failed
    return []


class _ScriptRuns:
    """A script's runs, each in a folder of its own."""

    def __init__(self, forkserver: ForkServer, request: dict[str, Any], folder: Path) -> None:
        self.forkserver, self.request, self.folder = forkserver, request, folder

    def observe(self, processes: int, *, launched: bool) -> list[Story]:
        """Run it on so many processes, as torchrun would if `launched`, and read what was seen."""
        folder = self.folder / str(processes)
        folder.mkdir()
        environ = _environ(processes) if launched else {}
        answer = self.forkserver.run(**self.request, processes=processes, folder=str(folder), environ=environ)
        name, limit = Path(self.request["script"]).name, self.request["limit"]
        statuses = [_status(folder, rank) for rank in range(processes)]
        for status in statuses:
            if status is not None and status["how"] in ("failed", "left"):
                place = f"{shortened(status['where'])}: " if status.get("where") else ""
                raise CheckError(f"{place}{status['error']}")
        for rank, status in enumerate(statuses):
            if status is None:
                raise CheckError(_why(answer, rank, limit, name))
        stories = [Story(Tape.load(folder / f"tape-{rank}.json")) for rank in range(processes)]
        if not all(story.updates for story in stories):
            own = next((event.where for event in stories[0].tape.of(ProcessStarted)), None)
            hint = f"; the processes that {shortened(own)} starts are not observed: use torchrun's way" if own else ""
            raise CheckError(f"{name} ended without a step of a torch optimizer, so there is nothing to check{hint}")
        return stories


def wants_processes(script: Path) -> bool:
    """Whether a script, or a module beside it, is made for several processes."""
    files = [script, *sorted(script.parent.glob("*.py"))[:50]]
    own = {script.stem, *re.findall(r"^\s*(?:from|import)\s+(\w+)", _text(script), re.MULTILINE)}
    return any(SEVERAL.search(_text(path)) for path in files if path.stem in own)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _environ(processes: int) -> dict[str, str]:
    """What torchrun sets; the rank is added where the processes are started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _status(folder: Path, rank: int) -> dict[str, Any] | None:
    path = folder / f"status-{rank}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _why(answer: dict[str, Any], rank: int, limit: float, name: str) -> str:
    said = [line for line in answer["tails"][rank].splitlines() if line.strip()]
    last = f"; it last said: {said[-1][:200]}" if said else ""
    if answer["timed_out"]:
        return f"{name} was not done after {limit:g} seconds{last}"
    code = answer["codes"][rank]
    what = f"was ended by signal {-code}" if code and code < 0 else f"left the process with code {code}"
    return f"{name} {what} before anything could be judged{last}"


def assert_clean(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    base_lr: float | None = None,
    base_minibatch: int | None = None,
    base_per_worker: int | None = None,
    base_weight_decay: float | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    limit: float = 120.0,
) -> None:
    """Check a script as `onehour check` does, and fail with the findings, if there are any.

    Args:
        script: a Python file.
        arguments: its own.
        base_lr, base_minibatch, base_per_worker, base_weight_decay: the recipe that it was scaled from.
        only, skip: ids of pitfalls to look for, or to leave out.
        limit: seconds for each run.

    Raises:
        AssertionError: with the table of findings.
        onehour.check.CheckError: if the script could not be run, or never stepped an optimizer.
    """
    base = Base(base_lr, base_minibatch, base_per_worker, base_weight_decay)
    findings = check_script(script, arguments, base=base, only=only, skip=skip, limit=limit).findings
    if findings:
        raise AssertionError(f"{len(findings)} finding(s) in {script}\n\n{as_table(findings)}")

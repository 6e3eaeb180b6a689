"""For test suites: a training script, or a loop inside a test, that must be clean."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onehour.check.pitfalls as pitfalls
from onehour.check.case import Base, Case
from onehour.check.formats import Report, shortened
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.check.story import Story
from onehour.check.tape import GroupJoined, ProcessStarted, Tape
from onehour.leaving import scratch

PROCESSES = 2
LEAST_SECONDS = 1.0  # a run that would have less is not begun
SEVERAL = re.compile(
    r"torch\.distributed|init_process_group|DistributedDataParallel|DistributedSampler|WORLD_SIZE|LOCAL_RANK"
    r"|[\"']RANK[\"']|\b(?:import|from) (?:accelerate|deepspeed|ignite|lightning|mmengine|onehour|pytorch_lightning"
    r"|transformers|torch import distributed)"
)
"""What a script that is made for several processes mentions."""


@dataclass(frozen=True)
class Command:
    """A script with its own arguments, or a module as `python -m NAME` starts it."""

    script: str
    arguments: list[str]
    module: str | None = None
    launcher: str | None = None
    """"torchrun", "launch" (its older form, which gives the script --local-rank), "accelerate" or "fabric"."""
    processes: int | None = None  # how many the launcher would start; None where it was not told by a number
    environ: dict[str, str] = field(default_factory=dict[str, str])
    """What was set before the command, or is set by the launcher."""


@dataclass
class Checked(Report):
    """What a script's check came to; stories of the last run, by rank, and what was run, in words."""

    stories: list[Story] = field(default_factory=list[Story])
    runs: str = ""


def check_script(
    script: str | Path | Command,
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
    """Run a script, unedited, and judge what was seen: on one process, and on two if it is made for several.

    Args:
        script: a Python file with its own arguments, or a command line that was read.
        base: the recipe that it was scaled from.
        only, skip: ids of pitfalls.
        strict: whether notes say of every pitfall that it was not judged, for want of a base too.
        limit: seconds for the whole check.
        forkserver, cwd: where to run it; None starts one, and is this folder.

    Raises:
        CheckError: if it could not be run, or never stepped an optimizer.
    """
    until = time.monotonic() + limit
    command = script if isinstance(script, Command) else Command(str(script), list(arguments))
    folder = Path(cwd or ".").resolve()
    path = Path(folder, command.script).resolve()
    if not path.is_file():
        raise CheckError(f"there is no script {command.script}")
    pitfalls.refuse_unknown([*only, *skip])
    with scratch("onehour-check-") as place, ExitStack() as stack:
        runs = _ScriptRuns(forkserver or stack.enter_context(ForkServer()), command, path, folder, place, limit, until)
        alone, several, notes = _observed(runs)
    findings = pitfalls.judge(Case([alone], base), only=only, skip=skip) if alone is not None else []
    if several:
        known = {finding.pitfall for finding in findings}
        more = pitfalls.judge(Case(several, base, alone), only=only, skip=skip)
        findings = pitfalls.worst_first([*findings, *(finding for finding in more if finding.pitfall not in known)])
    stories = several or [story for story in (alone,) if story is not None]
    notes += [*runs.notes, *pitfalls.not_judged(Case(stories, base, alone), pitfalls.PITFALLS if strict else only)]
    on = ["on one process"] * (alone is not None) + [f"on {len(several)} processes"] * bool(several)
    by = "a mount namespace" if runs.kept else "Python's own functions for files"
    said = f"ran {' and '.join(on)}; its files were protected by {by}"
    return Checked(pitfalls.not_silenced(findings), notes, stories, said)


def _observed(runs: _ScriptRuns) -> tuple[Story | None, list[Story], list[pitfalls.Note]]:
    """The story of one process, and those of several if the script is for them; what could not be observed."""
    wants = runs.command.launcher is not None or wants_processes(runs.script)
    alone: Story | None = None
    several: list[Story] = []
    notes: list[pitfalls.Note] = []
    failed: CheckError | None = None
    for launched in (False, True) if wants else (False,):  # as `python` runs it, or as a launcher if it only runs so
        try:
            (alone,) = runs.observe(1, launched=launched, share=3 - launched if wants else 1)
            break
        except CheckError as error:
            failed = error
    if runs.command.processes != 1 and (wants or (alone is not None and any(alone.tape.of(GroupJoined)))):
        try:
            stories = runs.observe(PROCESSES, launched=True)
            several = stories if all(any(story.tape.of(GroupJoined)) for story in stories) else []
        except CheckError as error:
            text = f"it could not be checked on {PROCESSES} processes: {error}"
            notes.append(pitfalls.Note(text, *pitfalls.ON_SEVERAL))
    if alone is None:
        assert failed is not None
        if not several:
            raise failed
        notes.append(pitfalls.Note(f"it could not be checked on one process: {failed}"))
    return alone, several, notes


@dataclass
class _ScriptRuns:
    """A script's runs, each in a folder of its own; all of them together end within `limit` seconds, at `until`."""

    forkserver: ForkServer
    command: Command
    script: Path
    cwd: Path
    folder: Path
    limit: float
    until: float
    notes: list[pitfalls.Note] = field(default_factory=list[pitfalls.Note])
    kept: bool = False

    def observe(self, processes: int, *, launched: bool, share: int = 1) -> list[Story]:
        """Run it on so many processes, as torchrun would if `launched`, and read what was seen.

        It may take one part in `share` of the time that is left.
        """
        on = f"on {processes} processes" if processes > 1 else "on one process"
        limit = (self.until - time.monotonic()) / share
        if limit < LEAST_SECONDS:
            raise CheckError(f"the {self.limit:g} seconds of the limit were over before the run {on}")
        folder = self.folder / f"{processes}{'-launched' * launched}"
        folder.mkdir()
        answer = self.forkserver.run(
            script=str(self.script),
            module=self.command.module,
            arguments=self.command.arguments,
            local_rank=launched and self.command.launcher == "launch",
            cwd=str(self.cwd),
            folder=str(folder),
            environ=self.command.environ | (_environ(processes, self.command.launcher) if launched else {}),
            processes=processes,
            limit=limit,
        )
        self.kept = answer["kept"]
        paths = [folder / f"tape-{rank}.json" for rank in range(processes)]
        tapes = {rank: Tape.load(path) for rank, path in enumerate(paths) if path.exists()}
        for rank, tape in tapes.items():
            if (end := tape.end)["how"] in ("failed", "left"):
                place = f"{shortened(end['where'])}: " if end.get("where") else ""
                said = _last_said(answer, rank) if end["how"] == "left" else ""
                hint = "" if end["updates"] else _own_processes(tape)
                raise CheckError(f"{place}{end['error']}{said}{hint}")
        name = self.script.name
        if gone := [rank for rank in range(processes) if rank not in tapes]:
            raise CheckError(_why(answer, gone[0], f"{name} {on}", limit))
        stories = [Story(tape) for tape in tapes.values()]
        if not all(story.updates for story in stories):
            said = f"{name} ended without a step of a torch optimizer, so there is nothing to check"
            raise CheckError(said + _own_processes(tapes[0]))
        late = [tape.end["updates"] for tape in tapes.values() if tape.end.get("late")]
        if late:
            text = f"the run {on} was stopped at update {min(late)}: {limit:.0f} s of the limit were its own"
            self.notes.append(pitfalls.Note(text))
        return stories


def _own_processes(tape: Tape) -> str:
    own = next((event.where for event in tape.of(ProcessStarted)), None)
    return f"; the processes that {shortened(own)} starts are not observed: use torchrun's way" if own else ""


def wants_processes(script: Path) -> bool:
    """Whether a script, or a module beside it, is made for several processes."""
    files = [script, *sorted(script.parent.glob("*.py"))[:50]]
    own = {script.stem, *re.findall(r"^\s*(?:from|import)\s+(\w+)", _text(script), re.MULTILINE)}
    return any(SEVERAL.search(_text(path)) for path in files if path.stem in own)


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _environ(processes: int, launcher: str | None) -> dict[str, str]:
    """What torchrun sets, and what others add; the rank is added where the processes are started."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environ = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return environ | ({"LT_DEVICES": str(processes)} if launcher == "fabric" else {})


def _last_said(answer: dict[str, Any], rank: int) -> str:
    said = [line for line in answer["tails"][rank].splitlines() if line.strip()]
    return f"; it last said: {said[-1].strip()[:200]}" if said else ""


def _why(answer: dict[str, Any], rank: int, run: str, limit: float) -> str:
    last = _last_said(answer, rank)
    if answer["timed_out"]:
        return f"{run} was not done after {limit:.0f} seconds{last}"
    code = answer["codes"][rank]
    what = f"was ended by signal {-code}" if code and code < 0 else f"exited with code {code}"
    return f"{run} {what} before anything could be judged{last}"


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

    Its arguments are those of `check_script`; the base's are the recipe that it was scaled from.

    Raises:
        AssertionError: with the table of findings.
        onehour.check.CheckError: if the script could not be run, or never stepped an optimizer.
    """
    base = Base(base_lr, base_minibatch, base_per_worker, base_weight_decay)
    check_script(script, arguments, base=base, only=only, skip=skip, limit=limit).assert_clean(str(script))

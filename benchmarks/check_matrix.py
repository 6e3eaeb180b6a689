"""The check on every loop that it is tested on: broken ones, their corrected twins, and right ones of many styles.

    python benchmarks/check_matrix.py

What has a line in runs/check/matrix.jsonl for the same content (of the loop, of the check, of torch and of the loop's
framework) is not run again: a run that was stopped goes on, and `make test-all` and this share their work. Loops of
frameworks that are not installed are listed as not run. Writes results/check_matrix.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onehour
from onehour.check.case import Base
from onehour.check.finding import Finding
from onehour.check.run.checking import check_script
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.check.tape import Trouble

ROOT = Path(__file__).resolve().parent.parent
LOOPS = ROOT / "tests" / "check" / "loops"
LINES = ROOT / "runs" / "check" / "matrix.jsonl"
PACKAGES = {"accelerate": "accelerate", "hf": "transformers", "lightning": "lightning", "timm": "timm"}
RIGHT = {"accelerate_loop": "accelerate", "hf_trainer": "hf", "lightning_module": "lightning", "timm_train": "timm"}
LIMIT = 120.0


MARKS = {"broken": "  # broken", "fixed": "  # right"}
"""At the ends of lines that one script of a pair has alone."""


@dataclass(frozen=True)
class Loop:
    """A script and what the check should say of it.

    Args:
        name: its path among the loops.
        text: of the script.
        pitfall: its own, or its twin's; None for one of the right loops.
        kind: "broken", "fixed" or "right".
        framework: a key of `PACKAGES`; None where torch is enough.
    """

    name: str
    text: str
    pitfall: str | None
    kind: str
    framework: str | None

    @property
    def stem(self) -> str:
        """Its file's name."""
        return Path(self.name).stem

    @property
    def reported(self) -> bool:
        """Whether it is as someone's closed bug report has it."""
        return self.name.startswith("history/")

    @property
    def expected(self) -> list[str]:
        """The ids that should be found."""
        return [self.pitfall] if self.kind == "broken" and self.pitfall else []

    @property
    def installed(self) -> bool:
        """Whether it can be run here."""
        return self.framework is None or release(PACKAGES[self.framework]) is not None

    @property
    def options(self) -> argparse.Namespace:
        """What its first line gives to the check: `# check: --base-lr 0.1 --base-minibatch 256`."""
        line = self.text.splitlines()[0]
        parser = argparse.ArgumentParser()
        parser.add_argument("--base-lr", type=float)
        parser.add_argument("--base-minibatch", type=int)
        parser.add_argument("--base-per-worker", type=int)
        parser.add_argument("--base-weight-decay", type=float)
        parser.add_argument("--skip", type=lambda text: text.split(","), default=[])
        return parser.parse_args(shlex.split(line.removeprefix("# check:")) if line.startswith("# check:") else [])

    @property
    def base(self) -> Base:
        """The recipe that it was scaled from."""
        given = self.options
        return Base(given.base_lr, given.base_minibatch, given.base_per_worker, given.base_weight_decay)

    def write(self, folder: Path) -> Path:
        """Write the script into a folder."""
        path = folder / f"{self.stem}.py"
        path.write_text(self.text, encoding="utf-8")
        return path

    def digest(self) -> str:
        """Of all that its result depends on."""
        package = PACKAGES.get(self.framework or "")
        parts = [code(), self.text.encode(), str(package and release(package)).encode()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@cache
def release(package: str) -> str | None:
    """An installed package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def code() -> bytes:
    """The digest of the check, of the rules that it uses, and of torch and Python."""
    source = Path(onehour.__file__).parent
    digest = hashlib.sha256(f"{sys.version_info[:2]} {release('torch')}".encode())
    for room in ("check", "rules"):
        for path in sorted((source / room).rglob("*.py")):
            digest.update(path.relative_to(source).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.digest()


def pair(lines: list[str]) -> dict[str, str]:
    """The text of each script of a pair.

    >>> pair(["step()", "step()  # broken", "zero()  # right"])
    {'broken': 'step()\nstep()\n', 'fixed': 'step()\nzero()\n'}
    """
    kinds = {}
    for kind, other in (("broken", "fixed"), ("fixed", "broken")):
        own = [line.removesuffix(MARKS[kind]) for line in lines if not line.endswith(MARKS[other])]
        kinds[kind] = "\n".join(own) + "\n"
    return kinds


def edited(base: list[str], edits: list[str]) -> list[str]:
    """The lines of a pair that is a base with edits: a diff whose hunks have no numbers.

    A line of an edit begins with a space (it is there), - (it goes) or + (it comes), and with < or > where it comes to
    the broken script alone, or to the right one. A hunk stands where its lines are found first, behind the hunk before.

    >>> edited(["a", "b"], ["@@", " a", "<step()", "@@", "-b", "+c"])
    ['a', 'step()  # broken', 'c']
    """
    marks = {"<": MARKS["broken"], ">": MARKS["fixed"], "+": ""}
    lines: list[str] = []
    at = 0
    for hunk in "\n".join(edits).removeprefix("@@\n").split("\n@@\n"):
        parts = [(line[:1], line[1:]) for line in hunk.split("\n")]
        there = [text for mark, text in parts if mark in " -"]
        start = next(i for i in range(at, len(base) + 1) if base[i : i + len(there)] == there)
        lines += base[at:start]
        lines += [text + marks.get(mark, "") for mark, text in parts if mark != "-"]
        at = start + len(there)
    return lines + base[at:]


def loops() -> list[Loop]:
    """All of them: plain pairs, pairs of frameworks and of closed bug reports, right loops."""
    found = []
    for path in sorted(LOOPS.glob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for kind, text in pair(lines).items():
            found.append(Loop(f"{path.stem}_{kind}.py", text, path.stem.partition("__")[0], kind, None))
    for path in sorted(LOOPS.glob("*/*.edits")):
        framework = path.stem if path.parent.name == "frameworks" else None
        base = path.with_suffix(".py").read_text(encoding="utf-8").splitlines()
        for variant in path.read_text(encoding="utf-8").removeprefix("=== ").split("\n\n=== "):
            name, *edits = variant.rstrip("\n").split("\n")
            for kind, text in pair(edited(base, edits)).items():
                name_of = f"{path.parent.name}/{name}_{kind}.py"
                found.append(Loop(name_of, text, name.partition("_")[0], kind, framework))
    for path in sorted((LOOPS / "right").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Loop(f"right/{path.name}", text, None, "right", RIGHT.get(path.stem)))
    return found


@dataclass(frozen=True)
class Outcome:
    """What came of a run: the findings, for each the line of the script that it names, and what else went wrong."""

    findings: list[Finding]
    lines: list[int | None]
    problems: list[str]


def outcome(loop: Loop, forkserver: ForkServer) -> Outcome:
    """Check a loop in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="onehour-matrix-") as folder:
        path, cwd = loop.write(Path(folder).resolve()), Path(folder, "cwd")
        cwd.mkdir()
        skip = loop.options.skip
        try:
            checked = check_script(path, base=loop.base, skip=skip, limit=LIMIT, forkserver=forkserver, cwd=cwd)
        except CheckError as error:
            return Outcome([], [], [str(error)])
        left = [f"left {path.name}" for path in cwd.iterdir()]
        trouble = [event for story in checked.stories for event in story.tape.of(Trouble)]
        problems = left + sorted({f"{event.observer}: {event.error}" for event in trouble})
        return Outcome(checked.findings, [_line(finding.where, loop, path) for finding in checked.findings], problems)


def _line(where: str | None, loop: Loop, path: Path) -> int | None:
    """The line of a finding, if it is one of the script's own."""
    file, _, line = (where or "").rpartition(":")
    lines = len(loop.text.splitlines())
    return int(line) if Path(file) == path and line.isdigit() and 0 < int(line) <= lines else None


def judged(loop: Loop, forkserver: ForkServer) -> dict[str, Any]:
    """Check a loop, and compare what is found with what should be."""
    began = time.monotonic()
    row: dict[str, Any] = {"loop": loop.name, "id": loop.pitfall, "framework": loop.framework, "kind": loop.kind}
    came = outcome(loop, forkserver)
    names = [finding.pitfall for finding in came.findings]
    row |= {"expected": loop.expected, "found": names}
    row["measured"] = [finding.measured for finding in came.findings]
    row["write"] = [finding.write for finding in came.findings]
    row["lines"] = came.lines
    row["where_ok"] = all(came.lines) if names else None
    row["problems"] = came.problems
    row["ok"] = names == loop.expected and row["where_ok"] is not False and not came.problems
    return row | {"seconds": round(time.monotonic() - began, 1)}


def known() -> dict[tuple[str, str], dict[str, Any]]:
    """The rows that were right, by loop and digest; others are run again."""
    rows = {}
    if LINES.exists():
        for line in LINES.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the end of a run that was killed
                continue
            if row["ok"]:
                rows[row["loop"], row["digest"]] = row
    return rows


def resumed(loop: Loop, forkserver: ForkServer) -> dict[str, Any]:
    """A loop's row: as it is known for the same content, or run now and written down."""
    digest = loop.digest()
    row = known().get((loop.name, digest))
    if row is None:
        row = judged(loop, forkserver) | {"digest": digest}
        LINES.parent.mkdir(parents=True, exist_ok=True)
        with LINES.open("a", encoding="utf-8") as lines:  # one write a line: tests run side by side
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return row


@contextmanager
def starting() -> Iterator[ForkServer]:
    """A process that has torch and the installed frameworks imported."""
    with ForkServer(preload=[package for package in PACKAGES.values() if release(package)]) as forkserver:
        yield forkserver


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts that the documents show."""
    broken = [row for row in rows if row["kind"] == "broken"]
    clean = [row for row in rows if row["kind"] != "broken"]
    return {
        "loops": len(rows),
        "broken": len(broken),
        "exactly_their_id": sum(row["found"] == row["expected"] for row in broken),
        "line_of_the_user": sum(row["where_ok"] is True for row in broken),
        "clean": len(clean),
        "false_alarms": sum(bool(row["found"]) for row in clean),
        "problems": sum(bool(row["problems"]) for row in rows),
    }


def main() -> None:
    """Run what is missing and write the result."""
    from results import write

    rows, not_run = [], []
    with starting() as forkserver:
        for loop in loops():
            if not loop.installed:
                not_run.append({"loop": loop.name, "needs": PACKAGES[loop.framework or ""]})
                continue
            row = resumed(loop, forkserver)
            rows.append({key: value for key, value in row.items() if key != "digest"})
            said = "" if row["ok"] else f"  {row['found']} {row['problems']}"
            print(f"{'ok ' if row['ok'] else 'BAD'} {row['seconds']:6.1f} s  {loop.name}{said}", flush=True)
    releases = {package: release(package) for package in PACKAGES.values()}
    write(
        __file__, "check_matrix", {"frameworks": releases, "summary": summary(rows), "rows": rows, "not_run": not_run}
    )


if __name__ == "__main__":
    main()

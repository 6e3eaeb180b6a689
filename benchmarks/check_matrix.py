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
from onehour.check.run.checking import check_script
from onehour.check.run.forkserver import CheckError, ForkServer
from onehour.check.tape import Trouble

ROOT = Path(__file__).resolve().parent.parent
LOOPS = ROOT / "tests" / "check" / "loops"
LINES = ROOT / "runs" / "check" / "matrix.jsonl"
PACKAGES = {"accelerate": "accelerate", "hf": "transformers", "lightning": "lightning", "timm": "timm"}
RIGHT = {"accelerate_loop": "accelerate", "hf_trainer": "hf", "lightning_module": "lightning", "timm_train": "timm"}
LIMIT = 120.0


@dataclass(frozen=True)
class Loop:
    """A script and what the check should say of it.

    Args:
        path: of the script.
        pitfall: its own, or its twin's; None for one of the right loops.
        kind: "broken", "fixed" or "right".
        framework: a key of `PACKAGES`; None where torch is enough.
    """

    path: Path
    pitfall: str | None
    kind: str
    framework: str | None

    @property
    def name(self) -> str:
        """Its path among the loops."""
        return self.path.relative_to(LOOPS).as_posix()

    @property
    def expected(self) -> list[str]:
        """The ids that should be found."""
        return [self.pitfall] if self.kind == "broken" and self.pitfall else []

    @property
    def installed(self) -> bool:
        """Whether it can be run here."""
        return self.framework is None or release(PACKAGES[self.framework]) is not None

    def digest(self) -> str:
        """Of all that its result depends on."""
        package = PACKAGES.get(self.framework or "")
        parts = [code(), self.path.read_bytes(), str(package and release(package)).encode()]
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


def loops() -> list[Loop]:
    """All of them: plain pairs, pairs of frameworks, right loops."""
    found = []
    for path in sorted(LOOPS.glob("*_*.py")):
        stem, _, kind = path.stem.rpartition("_")
        found.append(Loop(path, stem.partition("__")[0], kind, None))
    for path in sorted((LOOPS / "frameworks").glob("*.py")):
        pitfall, where, kind = path.stem.split("_")
        found.append(Loop(path, pitfall, kind, where.partition("-")[0]))
    for path in sorted((LOOPS / "right").glob("*.py")):
        found.append(Loop(path, None, "right", RIGHT.get(path.stem)))
    return found


def options(path: Path) -> argparse.Namespace:
    """What a script's first line gives to the check: `# check: --base-lr 0.1 --base-minibatch 256`."""
    line = path.read_text(encoding="utf-8").splitlines()[0]
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-lr", type=float)
    parser.add_argument("--base-minibatch", type=int)
    parser.add_argument("--base-per-worker", type=int)
    parser.add_argument("--base-weight-decay", type=float)
    parser.add_argument("--skip", type=lambda text: text.split(","), default=[])
    return parser.parse_args(shlex.split(line.removeprefix("# check:")) if line.startswith("# check:") else [])


def base_of(path: Path) -> Base:
    """The recipe that a script was scaled from."""
    given = options(path)
    return Base(given.base_lr, given.base_minibatch, given.base_per_worker, given.base_weight_decay)


def judged(loop: Loop, forkserver: ForkServer) -> dict[str, Any]:
    """Run a loop, in an empty folder, and compare what is found with what should be."""
    began = time.monotonic()
    row: dict[str, Any] = {"loop": loop.name, "id": loop.pitfall, "framework": loop.framework, "kind": loop.kind}
    found: list[Any] = []
    problems: list[str] = []
    try:
        with tempfile.TemporaryDirectory(prefix="onehour-matrix-") as folder:
            checked = check_script(
                loop.path,
                base=base_of(loop.path),
                skip=options(loop.path).skip,
                limit=LIMIT,
                forkserver=forkserver,
                cwd=folder,
            )
            problems += [f"left {path.name}" for path in Path(folder).iterdir()]
        found = checked.findings
        trouble = {f"{event.observer}: {event.error}" for story in checked.stories for event in story.tape.of(Trouble)}
        problems += sorted(trouble)
    except CheckError as error:
        problems.append(str(error))
    names = [finding.pitfall for finding in found]
    row |= {"expected": loop.expected, "found": names}
    row["measured"] = [finding.measured for finding in found]
    row["write"] = [finding.write for finding in found]
    row["lines"] = [_line(finding.where, loop.path) for finding in found]
    row["where_ok"] = all(row["lines"]) if found else None
    row["problems"] = problems
    row["ok"] = names == loop.expected and row["where_ok"] is not False and not problems
    return row | {"seconds": round(time.monotonic() - began, 1)}


def _line(where: str | None, path: Path) -> int | None:
    """The line of a finding, if it is one of the script's own."""
    file, _, line = (where or "").rpartition(":")
    lines = len(path.read_text(encoding="utf-8").splitlines())
    return int(line) if Path(file) == path and line.isdigit() and 0 < int(line) <= lines else None


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

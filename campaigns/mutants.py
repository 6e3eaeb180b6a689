"""Does a test fail where the code is wrong? A hundred small changes of src, each against its room's tests, then all.

    python -m campaigns.mutants [COMMIT] [--count 100] [--write]

An operator, a number or a condition of `src/` is changed: drawn from one seed, so the first N are the same each time. A
mutant runs against the tests that mirror its file and the file's own examples, one that survives against `make test`'s
whole. It goes on where it was stopped (runs/mutants/COMMIT.jsonl). With --write the counts and every survivor go into
benchmarks/results/mutants.json, beside those of other commits. 1 if any survives.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from campaigns.observed import ROOT, checked_out

SEED = 0x252F48A0
OUT = ROOT / "runs" / "mutants"
LIMITS = {"room": 900.0, "all": 3600.0}
"""Seconds after which a mutant counts as found, since it hangs."""
MARKERS = "not slow and not gpu and not browser and not frameworks and not vision"
PAIRS = [
    *((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.And, ast.Or), (ast.BitAnd, ast.BitOr), (ast.In, ast.NotIn)),
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot)),
]
OPERATORS = {one: other for pair in PAIRS for one, other in (pair, pair[::-1])}
OPERATORS |= {ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult}


@dataclass(frozen=True)
class Mutant:
    """A place in a file below `src/`, in bytes, and what stands there in its stead."""

    file: str
    line: int
    start: int
    end: int
    kind: str
    before: str
    after: str

    def applied(self, source: bytes) -> bytes:
        """The whole file with it."""
        return source[: self.start] + self.after.encode() + source[self.end :]


def swapped(node: ast.AST) -> tuple[str, ast.AST] | None:
    """A node's change and its kind; None for one that has none."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            return "operator", _with(node, op=OPERATORS[type(op)]())
        case ast.Compare(ops=[op]) if type(op) in OPERATORS:
            return "operator", _with(node, ops=[OPERATORS[type(op)]()])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return "operator", operand
        case ast.Constant(value=bool(value)):
            return "constant", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            return "constant", ast.Constant(value + 1 if isinstance(value, int) else 2 * value + (value == 0))
        case _:
            return None


def _with(node: ast.AST, **changes: Any) -> ast.AST:
    return type(node)(**{name: changes.get(name, getattr(node, name)) for name in node._fields})


def mutants_of(file: str, source: bytes) -> Iterator[Mutant]:
    """Every change of a file, but in annotations, texts, names that are listed, and what only type checkers read."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def made(node: ast.expr, kind: str, new: ast.AST) -> Mutant:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        before = source[start:end].decode()
        return Mutant(file, node.lineno, start, end, kind, before, f"({ast.unparse(new)})")

    def walk(node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, ast.JoinedStr):
            return  # Python 3.11 does not know where its parts are
        if isinstance(node, ast.Assign | ast.If) and ast.unparse(node).startswith(("__all__", "if TYPE_CHECKING")):
            return
        if isinstance(node, ast.expr) and (change := swapped(node)) is not None:
            yield made(node, *change)
        if isinstance(node, ast.If | ast.IfExp):
            yield made(node.test, "branch", ast.UnaryOp(ast.Not(), node.test))
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from walk(child)

    return walk(ast.parse(source))


def drawn(source: Path, count: int) -> list[Mutant]:
    """The first of all mutants of `src/`, in the seed's order."""
    files = sorted(path.relative_to(source.parent).as_posix() for path in source.rglob("*.py"))
    found = [mutant for file in files for mutant in mutants_of(file, (source.parent / file).read_bytes())]
    random.Random(SEED).shuffle(found)
    return found[:count]


def tests_of(file: str, tree: Path) -> list[str]:
    """The tests that mirror a file, and the file, for its examples; none where no test does."""
    room, *rest = Path(file).with_suffix("").parts[2:]
    mirror = f"tests/{room}" if rest else f"tests/test_{room}.py"
    return [mirror, file] if (tree / mirror).exists() else []


def fails(tree: Path, tests: list[str], limit: float) -> str:
    """The first test that fails, "hangs", or "" if all pass. No process of theirs stays."""
    token = f"MUTANT={os.getpid()}-{time.monotonic_ns()}"
    name, _, value = token.partition("=")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "worksteal"]
    environ = os.environ | {"PYTHONPATH": str(tree / "src"), name: value}
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(
            [*command, "-m", MARKERS, *tests], cwd=tree, env=environ, stdout=said, stderr=said, start_new_session=True
        )
        try:
            code = run.wait(limit)
        except subprocess.TimeoutExpired:
            return "hangs"
        finally:
            _end(token.encode())
            run.wait()
        said.seek(0)
        text = said.read()
    failed = [line.split(" - ")[0] for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (failed or [f"pytest leaves with {code}"])[0] if code else ""


def _end(token: bytes) -> None:
    """Kill what has this in its environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if token in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def tried(mutant: Mutant, tree: Path) -> dict[str, Any]:
    """By which tests it is found, if by any."""
    path, since = tree / mutant.file, time.monotonic()
    whole = path.read_bytes()
    path.write_bytes(mutant.applied(whole))
    try:
        room = tests_of(mutant.file, tree)
        by, test = "room", fails(tree, room, LIMITS["room"]) if room else ""
        if not test:
            by, test = "all", fails(tree, [], LIMITS["all"])
    finally:
        path.write_bytes(whole)
    seconds = round(time.monotonic() - since)
    return {**asdict(mutant), "by": by if test else "none", "test": test, "seconds": seconds}


def judged(commit: str, count: int) -> list[dict[str, Any]]:
    """The mutants of a commit: those that its ledger has, and the rest."""
    ledger = OUT / f"{commit}.jsonl"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    found = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    with tempfile.TemporaryDirectory() as temporary, checked_out(commit, Path(temporary) / "tree") as source:
        for mutant in drawn(source, count)[len(found) :]:
            found.append(tried(mutant, source.parent))
            with ledger.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
            print(
                f"{len(found)}: {mutant.file}:{mutant.line} {mutant.before!r} → {mutant.after!r}: {found[-1]['test']}"
            )
    return found[:count]


def main() -> int:
    """Run what is missing; 1 if any mutant survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/mutants.json")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    named = subprocess.run(["git", "rev-parse", options.commit], cwd=ROOT, capture_output=True, text=True, check=True)
    commit = named.stdout.strip()
    found = judged(commit, options.count)
    survivors = [mutant for mutant in found if mutant["by"] == "none"]
    by = {tests: sum(mutant["by"] == tests for mutant in found) for tests in ("room", "all", "none")}
    print(f"{len(found)} mutants of {commit[:7]}: {by['room']} found by their room, {by['all']} by others' tests")
    for mutant in survivors:
        print(f"  survives: {mutant['file']}:{mutant['line']} {mutant['before']} → {mutant['after']}")
    if options.write:
        from benchmarks import results  # which imports torch, and needs a clone

        path = results.RESULTS / "mutants.json"
        states = json.loads(path.read_text())["states"] if path.exists() else []
        state = {"commit": commit, "mutants": len(found), "by": by, "survivors": survivors}
        states = [*(other for other in states if other["commit"] != commit), state]
        results.write(__file__, "mutants", {"seed": SEED, "states": states})
    return int(bool(survivors))


if __name__ == "__main__":
    sys.exit(main())

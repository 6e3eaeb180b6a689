"""Does a test fail where the code is wrong? A hundred small changes of src, each against the tests that come by it.

    python -m campaigns.mutants [COMMIT] [--count 100] [--write]

An operator, a number or a condition of `src/` is changed: drawn from one seed, so the first N are the same each time.
Once, `make test`'s tests run with a probe at each of these places, which notes the test that comes by, in processes
of tests too. Then a mutant runs against these tests, then against all of its room, since what is in a sandbox leaves no
note; and against all tests where something else came by, as an import does. It goes on where it was stopped
(runs/mutants, and what is committed). With --write, what is known by then goes into benchmarks/results/mutants.json,
beside other commits'. 1 if any survives.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from campaigns.observed import ROOT, checked_out

SEED = 0x252F48A0
OUT = ROOT / "runs" / "mutants"
RESULT = ROOT / "benchmarks" / "results" / "mutants.json"
LIMIT = 3600.0
"""Seconds after which a mutant counts as found, since it hangs."""
USAGE = 4
"""What pytest leaves with where it does not find a test."""
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


PROBE = """
import os
_noted = set()
def passed(number):
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    if (number, test) not in _noted:
        _noted.add((number, test))
        with open({path!r}, "a") as file:
            file.write(f"{{number}} {{test}}\\n")
"""
"""A module that notes which test comes by where."""


def probed(source: bytes, mutants: dict[int, Mutant]) -> bytes:
    """A file with a probe at each of its mutants' places, but where an expression may not stand, as in patterns."""
    cuts: list[tuple[int, int, bytes]] = []
    for number, mutant in sorted(mutants.items(), key=lambda item: item[1].end - item[1].start):
        size = mutant.end - mutant.start  # an outer one's comes before an inner one's, and after it at the end
        before, after = b"(__import__('mutants_probe').passed(%d), (" % number, b"))[1]"
        with_it = [*cuts, (mutant.start, -size, before), (mutant.end, size - len(source), after)]
        with suppress(SyntaxError):
            ast.parse(_inserted(source, with_it))
            cuts = with_it
    return _inserted(source, cuts)


def _inserted(source: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
    for place, _, text in sorted(cuts, reverse=True):
        source = source[:place] + text + source[place:]
    return source


def covering(mutants: list[Mutant], tree: Path, temporary: Path) -> list[list[str]]:
    """For each mutant the tests that come by, "" for what is outside any; one that the probes disturb comes by all."""
    notes = temporary / "notes"
    notes.touch()
    (temporary / "mutants_probe.py").write_text(PROBE.format(path=str(notes)))
    whole = {file: (tree / file).read_bytes() for file in {mutant.file for mutant in mutants}}
    for file, source in whole.items():
        own = {number: mutant for number, mutant in enumerate(mutants) if mutant.file == file}
        (tree / file).write_bytes(probed(source, own))
    try:
        _, said = _pytest(tree, ["-n", "2", "--dist", "worksteal"], str(temporary))
    finally:
        for file, source in whole.items():
            (tree / file).write_bytes(source)
    found = [{*_failed(said)} for _ in mutants]
    for line in notes.read_text().splitlines():
        number, _, test = line.partition(" ")
        found[int(number)].add(test)
    return [sorted(tests) for tests in found]


def fails(tree: Path, tests: list[str]) -> str:
    """The first of these tests that fails, "hangs", or "" if all pass."""
    code, said = _pytest(tree, ["-x", *tests])
    if code == USAGE:  # a name with what pytest escapes is not one that it finds
        code, said = _pytest(tree, ["-x", *dict.fromkeys(test.partition("[")[0] for test in tests)])
    if code is None:
        return "hangs"
    return (_failed(said) or [f"pytest leaves with {code}"])[0] if code else ""


def _failed(said: str) -> list[str]:
    lines = (line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR ")))
    return [line.partition(" ")[2].split(" - ")[0] for line in lines]


def _pytest(tree: Path, options: list[str], *path: str) -> tuple[int | None, str]:
    """Its exit code, None if it hangs, and what it says. No process of its tests stays."""
    token = f"{os.getpid()}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", MARKERS]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree / "src"), *path]), "MUTANT": token}
    with tempfile.TemporaryFile("w+") as said:
        run = subprocess.Popen(
            [*command, *options], cwd=tree, env=environ, stdout=said, stderr=said, start_new_session=True
        )
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = run.wait(LIMIT)
        _end(f"MUTANT={token}".encode())
        run.wait()
        said.seek(0)
        return code, said.read()


def _end(token: bytes) -> None:
    """Kill what has this in its environment."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if token in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)


def tried(mutant: Mutant, tests: list[str], tree: Path) -> dict[str, Any]:
    """By which tests it is found, if by any: those of its room, or others."""
    path, since = tree / mutant.file, time.monotonic()
    whole = path.read_bytes()
    path.write_bytes(mutant.applied(whole))
    room, *rest = Path(mutant.file).with_suffix("").parts[2:]
    mirror = f"tests/{room}" if rest else f"tests/test_{room}.py"
    near = [test for test in tests if test.startswith((mirror, mutant.file))]
    far = [test for test in tests if test and test not in near]
    side_by_side = ["-n", "2", "--dist", "worksteal"]
    steps = [("room", near), ("all", far)]
    if (tree / mirror).exists():
        steps.append(("room", [*side_by_side, mirror, mutant.file]))
    if not tests or "" in tests:
        steps.append(("all", side_by_side))
    found = ("none", "")
    try:
        for by, chosen in steps:
            if chosen and not found[1]:
                found = (by, fails(tree, chosen))
    finally:
        path.write_bytes(whole)
    by, test = found if found[1] else ("none", "")
    return {**asdict(mutant), "by": by, "test": test, "tests": len(tests), "seconds": round(time.monotonic() - since)}


def states() -> dict[str, list[dict[str, Any]]]:
    """The committed lines of every commit."""
    content = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {"states": []}
    return {state["commit"]: state["mutants"] for state in content["states"]}


def known(commit: str) -> dict[int, dict[str, Any]]:
    """What has been tried, by number: committed, or in the ledger."""
    ledger = OUT / f"{commit}.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else []
    return {line["number"]: line for line in [*states().get(commit, []), *lines]}


def judged(commit: str, count: int) -> list[dict[str, Any]]:
    """The mutants of a commit: those that its ledger has, and the rest, two at a time."""
    ledger, passing = OUT / f"{commit}.jsonl", OUT / f"{commit}.json"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    found = known(commit)
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        trees = [stack.enter_context(checked_out(commit, temporary / str(number))).parent for number in range(2)]
        mutants = drawn(trees[0] / "src", count)
        if not passing.exists():
            passing.write_text(json.dumps(covering(mutants, trees[0], temporary)))
        covered = json.loads(passing.read_text())
        free = SimpleQueue[Path]()
        for tree in trees:
            free.put(tree)

        def one(number: int) -> None:
            tree = free.get()
            line = {"number": number, **tried(mutants[number], covered[number], tree)}
            free.put(tree)
            with ledger.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{number}: {line['file']}:{line['line']} {line['before']!r} → {line['after']!r}: {line['test']}")
            found[number] = line

        with ThreadPoolExecutor(len(trees)) as pool:
            list(pool.map(one, [number for number in range(len(mutants)) if number not in found]))
    return [found[number] for number in range(count)]


def main() -> int:
    """Run what is missing; 1 if any mutant survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", default="HEAD")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--write", action="store_true", help="what is known, without a further try")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left behind
    named = subprocess.run(["git", "rev-parse", options.commit], cwd=ROOT, capture_output=True, text=True, check=True)
    commit = named.stdout.strip()
    found = [*known(commit).values()] if options.write else judged(commit, options.count)
    by = {tests: sum(mutant["by"] == tests for mutant in found) for tests in ("room", "all", "none")}
    print(f"{len(found)} mutants of {commit[:7]}: {by['room']} found by their room, {by['all']} by others' tests")
    for mutant in found:
        if mutant["by"] == "none":
            print(f"  survives: {mutant['file']}:{mutant['line']} {mutant['before']} → {mutant['after']}")
    if options.write:
        from benchmarks import results  # which imports torch, and needs a clone

        mutants = sorted(found, key=lambda mutant: mutant["number"])
        content = [{"commit": name, "mutants": lines} for name, lines in (states() | {commit: mutants}).items()]
        results.write(__file__, RESULT.stem, {"seed": SEED, "states": content})
    return int(by["none"] > 0)


if __name__ == "__main__":
    sys.exit(main())

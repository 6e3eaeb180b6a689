"""What a pitfall is, and what is found of it in a loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onehour.check.case import Case


@dataclass(frozen=True)
class Finding:
    """One pitfall of the paper in someone's loop, with the numbers that show it.

    Args:
        pitfall: its id.
        severity: "error" (another model is trained than meant), "warning" (accuracy suffers) or "note".
        measured: what the loop does.
        expected: what it would do if it were right.
        where: file:line of the user's code, or None where it could not be seen.
        section: of the paper.
        remedy: what to change.
        write: at most three lines to write instead, with what was measured in them.
    """

    pitfall: str
    severity: str
    measured: str
    expected: str
    where: str | None
    section: str
    remedy: str
    write: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pitfall:
    """A pitfall: how it is seen, and what is said of it; see `pitfall`."""

    id: str
    severity: str
    section: str
    why: str
    remedy: str
    write: tuple[str, ...]
    symptoms: tuple[str, ...]
    judge: Callable[[Case], Finding | None]

    def __call__(self, case: Case) -> Finding | None:
        return self.judge(case)

    def found(
        self,
        *,
        measured: str,
        expected: str,
        where: str | None,
        severity: str | None = None,
        remedy: str | None = None,
        write: tuple[str, ...] | None = None,
        **values: Any,
    ) -> Finding:
        """A finding of it; severity, remedy and lines to write are its own, filled with the values, unless given."""
        lines = tuple(line.format_map(values) for line in (self.write if write is None else write))
        remedy, severity = remedy or self.remedy, severity or self.severity
        return Finding(self.id, severity, measured, expected, where, self.section, remedy, lines)


def pitfall(
    severity: str,
    section: str,
    *,
    why: str,
    remedy: str,
    write: tuple[str, ...],
    symptoms: tuple[str, ...] = (),
) -> Callable[[Callable[[Case], Finding | None]], Pitfall]:
    """Declare a pitfall above the function that finds it in a case, or returns None without evidence.

    Its id, on the command line and of its page docs/checks/ID.md, is the function's name with dashes.

    Args:
        why: the rule that is broken, in a line.
        write: at most three lines to write instead, with onehour's rule and without; {names} stand for what a finding
            has measured.
        symptoms: ids that are its consequences, and are not listed beside it.

    >>> @pitfall("note", "§1", why="an hour is enough", remedy="hurry", write=("lr = {k} * lr",))
    ... def too_slow(case):
    ...     return too_slow.found(measured="29 hours", expected="1 hour", where="train.py:7", k=32)
    >>> too_slow(Case([])).pitfall, too_slow(Case([])).write
    ('too-slow', ('lr = 32 * lr',))
    """

    def declared(judge: Callable[[Case], Finding | None]) -> Pitfall:
        return Pitfall(judge.__name__.replace("_", "-"), severity, section, why, remedy, write, symptoms, judge)

    return declared

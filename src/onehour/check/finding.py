"""What the check says: one finding a pitfall, as a row of a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onehour.check.catalogue import PITFALLS

__all__ = ["Finding", "as_json", "as_table", "found"]


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

    >>> found("double-step", measured="2 steps", expected="1 step", where="train.py:7").severity
    'error'
    """

    pitfall: str
    severity: str
    measured: str
    expected: str
    where: str | None
    section: str
    remedy: str
    write: tuple[str, ...] = ()


def found(
    pitfall: str,
    *,
    measured: str,
    expected: str,
    where: str | None,
    remedy: str | None = None,
    write: tuple[str, ...] | None = None,
    **values: Any,
) -> Finding:
    """A finding with what the catalogue says of its pitfall.

    Args:
        pitfall: an id of the catalogue.
        measured, expected, where: as in `Finding`.
        remedy, write: in place of the catalogue's, where more is known.
        values: what stands for the names in the lines to write.

    >>> found("accumulation-not-divided", measured="2 sums", expected="a mean", where=None, a=2).write
    ('(loss / 2).backward()',)
    """
    about = PITFALLS[pitfall]
    lines = tuple(line.format_map(values) for line in (about.write if write is None else write))
    return Finding(pitfall, about.severity, measured, expected, where, about.section, remedy or about.remedy, lines)


def as_json(findings: Sequence[Finding]) -> str:
    """A list of objects, findings only.

    >>> as_json([])
    '[]'
    """
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False)


def as_table(findings: Sequence[Finding], width: int = 100) -> str:
    """For a terminal: one block a finding, worst first as given.

    Args:
        findings: in the order to print.
        width: columns of the terminal.

    >>> print(as_table([found("double-step", measured="2 steps", expected="1 step", where="train.py:7")], width=72))
    error  double-step  train.py:7
      measured  2 steps
      expected  1 step
      why       §2.1, eq 2: one update takes one gradient once
      remedy    with a GradScaler call scaler.step(optimizer) alone; remove
                the second optimizer.step()
      write     scaler.step(optimizer)  # the only step
                scaler.update()
    """
    return "\n\n".join(_block(finding, width) for finding in findings)


def _block(finding: Finding, width: int) -> str:
    lines = [f"{finding.severity}  {finding.pitfall}  {shortened(finding.where)}"]
    rows = {
        "measured": finding.measured,
        "expected": finding.expected,
        "why": f"{finding.section}: {PITFALLS[finding.pitfall].why}",
        "remedy": finding.remedy,
    }
    for name, text in rows.items():
        lines += textwrap.wrap(text, width, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
    lines += [f"  {'' if i else 'write':<10}{line}" for i, line in enumerate(finding.write)]
    return "\n".join(lines)


def shortened(where: str | None) -> str:
    """A place relative to the current folder if it lies in it.

    >>> shortened(None)
    '(place unknown)'
    """
    if where is None:
        return "(place unknown)"
    relative = os.path.relpath(where)
    return where if relative.startswith(os.pardir) else relative

"""The remedies of a check's findings as one unified diff."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from onehour.check.case import Case
from onehour.check.finding import Finding, shortened
from onehour.check.remedies.changes import Changes, overlap
from onehour.check.remedies.edits import EDITS
from onehour.check.remedies.fix import Fix
from onehour.check.remedies.source import Source, UnsureError, lines_of, parsed, place

__all__ = ["Patch", "patch"]


@dataclass
class Patch:
    """What can be mended by rule, and what cannot.

    Args:
        diff: unified, of paths relative to the current folder, for `patch -p0` and `git apply`.
        left: of each finding that it does not mend, why.

    >>> Patch().diff
    ''
    """

    diff: str = ""
    left: list[str] = field(default_factory=list)


def patch(findings: Sequence[Finding], case: Case) -> Patch:
    """A diff for the findings that have a mechanical remedy in one known place.

    A finding is mended whole or not at all: where its code is written in a way for which no edit is known to be right,
    or where an edit before changes the same place, it is left.

    Args:
        findings: of the case.
        case: what was seen.

    >>> patch([], Case([]))
    Patch(diff='', left=[])
    """
    made = Patch()
    done: dict[str, Changes] = {}
    for finding in findings:
        try:
            _mend(finding, case, done)
        except UnsureError as error:
            made.left.append(f"{finding.pitfall} ({shortened(finding.where)}): {error}")
        except Exception as error:  # what was found is worth more than its edit
            why = f"the edit failed, {type(error).__name__}: {error}"
            made.left.append(f"{finding.pitfall} ({shortened(finding.where)}): {why}")
    made.diff = "".join(_diff(changes.source, changes.text()) for changes in done.values() if changes.edits)
    outside = [file for file in done if _name(file) != os.path.join(".", os.path.relpath(file))]
    made.left += [f"{file} is not in the current folder: apply its part in {os.path.dirname(file)}" for file in outside]
    return made


def _mend(finding: Finding, case: Case, done: dict[str, Changes]) -> None:
    at, edit = place(finding.where), EDITS.get(finding.pitfall)
    if edit is None:
        raise UnsureError(f"no mechanical remedy: {finding.remedy}")
    if at is None:
        raise UnsureError("its place is not known")
    file, line = at
    source = done[file].source if file in done else Source.read(file)
    if source is None:
        raise UnsureError("the file cannot be read as UTF-8 Python")
    changes = Changes(source)
    edit(Fix(finding, case, source, line, changes))
    if changes.text() == source.text:
        raise UnsureError("the code is as its remedy has it already")
    before = done.get(file) or Changes(source)
    if overlap(changes.edits, before.edits):
        raise UnsureError("another remedy changes the same place; apply the patch and check again")
    both = Changes(source)
    both.edits = before.edits + [edit for edit in changes.edits if edit not in before.edits]
    try:
        parsed(both.text())
    except SyntaxError as error:
        raise UnsureError(f"the edit would not be Python ({error.msg})") from None
    done[file] = both


def _name(file: str) -> str:
    """./PATH: `git apply` takes the first part off, `patch -p0` does not mind it."""
    relative = os.path.relpath(file)
    return os.path.join(".", os.path.basename(file) if relative.startswith(os.pardir) else relative)


def _diff(source: Source, text: str) -> str:
    name = _name(source.file)
    lines = difflib.unified_diff(source.lines, lines_of(text), name, name)
    return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)

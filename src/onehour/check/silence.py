"""A comment in the user's code silences a finding there: `# onehour: ignore[double-step]`."""

from __future__ import annotations

import linecache
import re
from collections.abc import Sequence

from onehour.check.finding import Finding

__all__ = ["not_silenced"]

_COMMENT = re.compile(r"#\s*onehour:\s*ignore(?:\[([\w\s,-]*)\])?")


def not_silenced(findings: Sequence[Finding]) -> list[Finding]:
    """The findings whose line, or the line above it, has no comment that names them; one without ids silences all.

    >>> not_silenced([])
    []
    """
    return [finding for finding in findings if not _silenced(finding)]


def _silenced(finding: Finding) -> bool:
    if finding.where is None:
        return False
    file, _, line = finding.where.rpartition(":")
    if not line.isdigit():
        return False
    linecache.checkcache(file)
    number = int(line)
    texts = [linecache.getline(file, number)]
    above = linecache.getline(file, number - 1).strip()
    if above.startswith("#"):
        texts.append(above)
    return any(names(text, finding.pitfall) for text in texts)


def names(text: str, pitfall: str) -> bool:
    """Whether a line's comment silences a pitfall.

    >>> names("optimizer.step()  # onehour: ignore[double-step]", "double-step")
    True
    >>> names("optimizer.step()  # onehour: ignore[double-step]", "no-warmup")
    False
    """
    match = _COMMENT.search(text)
    if match is None:
        return False
    return match[1] is None or pitfall in {part.strip() for part in match[1].split(",")}

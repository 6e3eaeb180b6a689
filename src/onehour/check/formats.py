"""How findings are shown: in a terminal, as JSON, as SARIF for code scanning, and as GitHub's lines beside a change."""

from __future__ import annotations

import dataclasses
import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import onehour
from onehour.check.finding import Finding
from onehour.check.pitfalls import PITFALLS, Note

_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"


@dataclass
class Report:
    """What a loop came to: findings, worst first, and notes of what could not be judged; empty while it runs."""

    findings: list[Finding] = field(default_factory=list[Finding])
    notes: list[Note] = field(default_factory=list[Note])

    def __str__(self) -> str:
        return as_table(self.findings) if self.findings else "nothing found"

    def assert_clean(self, where: str = "the training loop") -> None:
        """For tests: an AssertionError with the findings, if there are any."""
        if self.findings:
            raise AssertionError(f"{len(self.findings)} finding(s) in {where}\n\n{self}")


def as_table(findings: Sequence[Finding], width: int = 100) -> str:
    """For a terminal of so many columns: a block a finding.

    >>> finding = PITFALLS["double-step"].found(measured="2 steps", expected="1 step", where="train.py:7")
    >>> print(as_table([finding], width=72))
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
    for name, text in _said(finding).items():
        lines += textwrap.wrap(text, width, initial_indent=f"  {name:<10}", subsequent_indent=" " * 12)
    lines += [f"  {'' if i else 'write':<10}{line}" for i, line in enumerate(finding.write)]
    return "\n".join(lines)


def shortened(where: str | None) -> str:
    """A place relative to the current folder if it lies in it."""
    if where is None:
        return "(place unknown)"
    relative = os.path.relpath(where)
    return where if relative.startswith(os.pardir) else relative


def as_json(findings: Sequence[Finding]) -> str:
    return json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2, ensure_ascii=False)


def as_sarif(findings: Sequence[Finding], script: str) -> str:
    """A SARIF 2.1.0 log of one run; findings without a place of their own are placed in the script."""
    ids = list(dict.fromkeys(finding.pitfall for finding in findings))
    rules = [
        {
            "id": name,
            "shortDescription": {"text": PITFALLS[name].why},
            "help": {"text": PITFALLS[name].remedy},
            "defaultConfiguration": {"level": PITFALLS[name].severity},
        }
        for name in ids
    ]
    driver = {"name": "onehour", "version": onehour.__version__, "rules": rules}
    results = [_result(finding, ids.index(finding.pitfall), script) for finding in findings]
    runs = [{"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}]
    return json.dumps({"$schema": _SARIF, "version": "2.1.0", "runs": runs}, indent=2, ensure_ascii=False)


def _result(finding: Finding, rule: int, script: str) -> dict[str, Any]:
    file, line = _place(finding, script)
    inside = not os.path.isabs(file)
    artifact = {"uri": quote(file), "uriBaseId": "%SRCROOT%"} if inside else {"uri": Path(file).as_uri()}
    return {
        "ruleId": finding.pitfall,
        "ruleIndex": rule,
        "level": finding.severity,
        "message": {"text": _message(finding)},
        "locations": [{"physicalLocation": {"artifactLocation": artifact, "region": {"startLine": line}}}],
    }


def as_annotations(findings: Sequence[Finding], script: str) -> str:
    """GitHub's workflow commands, a line a finding; those without a place of their own are placed in the script."""
    lines = []
    for finding in findings:
        file, line = _place(finding, script)
        file = _escaped(file).replace(":", "%3A").replace(",", "%2C")
        kind = "notice" if finding.severity == "note" else finding.severity
        lines.append(f"::{kind} file={file},line={line},title={finding.pitfall}::{_escaped(_message(finding))}")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _place(finding: Finding, script: str) -> tuple[str, int]:
    file, _, line = (finding.where or "").rpartition(":")
    path = Path(file or script).absolute()
    here = Path.cwd()
    name = path.relative_to(here) if path.is_relative_to(here) else path
    return name.as_posix(), int(line) if line.isdigit() else 1


def _message(finding: Finding) -> str:
    return "\n".join([*(f"{name}: {text}" for name, text in _said(finding).items()), *finding.write])


def _said(finding: Finding) -> dict[str, str]:
    return {
        "measured": finding.measured,
        "expected": finding.expected,
        "why": f"{finding.section}: {PITFALLS[finding.pitfall].why}",
        "remedy": finding.remedy,
    }

"""Findings as other tools read them: SARIF for code scanning, and the lines that GitHub shows beside a change."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onehour
from onehour.check.finding import Finding
from onehour.check.judge import PITFALLS

_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"


def as_sarif(findings: Sequence[Finding], script: str) -> str:
    """A SARIF 2.1.0 log of one run.

    Args:
        findings: in the order to list.
        script: where those are placed that have no place of their own.
    """
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
    artifact = {"uri": file, "uriBaseId": "%SRCROOT%"} if inside else {"uri": Path(file).as_uri()}
    return {
        "ruleId": finding.pitfall,
        "ruleIndex": rule,
        "level": finding.severity,
        "message": {"text": _message(finding)},
        "locations": [{"physicalLocation": {"artifactLocation": artifact, "region": {"startLine": line}}}],
    }


def as_annotations(findings: Sequence[Finding], script: str) -> str:
    """GitHub's workflow commands, one line a finding.

    Args:
        findings: in the order to list.
        script: where those are placed that have no place of their own.

    >>> finding = PITFALLS["double-step"].found(measured="2 steps", expected="1 step", where="/x/train.py:7")
    >>> as_annotations([finding], "train.py").partition("%0A")[0]
    '::error file=/x/train.py,line=7,title=double-step::measured: 2 steps'
    """
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
    """The file, relative to the current folder if it lies in it, and the line."""
    file, _, line = (finding.where or "").rpartition(":")
    path = Path(file or script).absolute()
    here = Path.cwd()
    name = path.relative_to(here) if path.is_relative_to(here) else path
    return name.as_posix(), int(line) if line.isdigit() else 1


def _message(finding: Finding) -> str:
    lines = [f"measured: {finding.measured}", f"expected: {finding.expected}"]
    lines.append(f"why: {finding.section}: {PITFALLS[finding.pitfall].why}")
    lines.append(f"remedy: {finding.remedy}")
    return "\n".join([*lines, *finding.write])

"""Findings for other tools, and the hook and the workflow that the docs show, as far as they run here."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from onehour.check.formats import as_annotations, as_sarif
from onehour.check.pitfalls import PITFALLS
from onehour.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "checks" / "README.md"
HOOK, WORKFLOW = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.fixture
def project(loops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a train.py that has a finding."""
    shutil.copy(loops / "double-step_broken.py", tmp_path / "train.py")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)


def test_the_hook_stops_a_push_with_a_finding(project: Path, monkeypatch: pytest.MonkeyPatch):
    (project / "bin").mkdir()
    (project / "bin" / "onehour").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m onehour "$@"\n')
    (project / "bin" / "onehour").chmod(0o700)
    monkeypatch.setenv("PATH", f"{project / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(project / "home"))
    (project / ".pre-commit-config.yaml").write_text(yaml.safe_dump(HOOK))
    assert shell("git init -q . && git add train.py .pre-commit-config.yaml").returncode == 0
    stopped = shell(f"{shlex.quote(sys.executable)} -m pre_commit run --all-files --hook-stage pre-push")
    assert stopped.returncode == 1
    assert "error  double-step  train.py:" in stopped.stdout


def step(name: str) -> dict[str, Any]:
    """Of the workflow."""
    return next(each for each in WORKFLOW["jobs"]["check"]["steps"] if name in (each.get("name"), each.get("uses")))


def onehour(line: str) -> int:
    """A line of shell with our command alone, without a process of its own; `>` takes what it prints."""
    name, *words = shlex.split(line)
    assert name == "onehour"
    if ">" not in words:
        return main(words)
    with open(words[-1], "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        return main(words[: words.index(">")])


@pytest.mark.usefixtures("project", "started")
def test_the_workflow_marks_the_line(capsys: pytest.CaptureFixture[str]):
    assert onehour(step("annotations")["run"]) == 1
    (mark,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("::")]
    file, line = re.match(r"::error file=(train\.py),line=(\d+),title=double-step::measured: ", mark).groups()  # type: ignore[union-attr]
    assert "optimizer.step()" in Path(file).read_text().splitlines()[int(line) - 1]
    assert mark.count("%0A") >= 3


@pytest.mark.usefixtures("project", "started")
def test_the_workflow_feeds_code_scanning():
    assert onehour(step("code scanning")["run"]) == 1
    log = json.loads(Path(step("github/codeql-action/upload-sarif@v3")["with"]["sarif_file"]).read_text())
    (run,) = log["runs"]
    (result,) = run["results"]
    assert log["version"] == "2.1.0"
    assert (result["ruleId"], result["level"]) == ("double-step", "error")
    assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == "double-step"
    place = result["locations"][0]["physicalLocation"]
    assert place["artifactLocation"] == {"uri": "train.py", "uriBaseId": "%SRCROOT%"}
    assert place["region"]["startLine"] > 1


def test_names_with_commas_and_findings_without_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = [
        PITFALLS["no-warmup"].found(measured="100 %", expected="less", where=f"{tmp_path}/a,b:c.py:7", write=()),
        PITFALLS["warmup-start"].found(measured="1", expected="0", where=None, write=()),
        PITFALLS["double-step"].found(measured="2", expected="1", where="/elsewhere/é.py:3"),
    ]
    first, second, third = as_annotations(found, "train.py").splitlines()
    assert first.startswith("::warning file=a%2Cb%3Ac.py,line=7,title=no-warmup::measured: 100 %25%0Aexpected: less%0A")
    assert second.startswith("::notice file=train.py,line=1,title=warmup-start::")
    assert third.startswith("::error file=/elsewhere/é.py,line=3,")
    results = json.loads(as_sarif(found, "train.py"))["runs"][0]["results"]
    places = [result["locations"][0]["physicalLocation"]["artifactLocation"] for result in results]
    assert [place["uri"] for place in places] == ["a%2Cb%3Ac.py", "train.py", "file:///elsewhere/%C3%A9.py"]
    assert [result["level"] for result in results] == ["warning", "note", "error"]


def test_the_fields_that_are_documented_are_those_that_are_printed():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE.read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    finding = PITFALLS["double-step"].found(measured="2", expected="1", where=None)
    assert sorted(named) == sorted(vars(finding))

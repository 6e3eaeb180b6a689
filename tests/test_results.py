"""Every committed result names a committed state that made it, and that state's script writes what is in it."""

import ast
import importlib
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import onehour

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs the history: this is no clone")


def git(*arguments: str, cwd: Path = ROOT) -> str:
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def keys(content: Any, depth: int = 2) -> Iterator[str]:
    """The keys of a result down to its second level, those within lists too."""
    if isinstance(content, dict) and depth:
        for key, value in content.items():
            yield key
            yield from keys(value, depth - 1)
    elif isinstance(content, list):
        for value in content:
            yield from keys(value, depth)


def imported(source: str) -> list[str]:
    """The other scripts of benchmarks that a script imports from."""
    modules = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    return [f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.py") if path.stem in modules]


def written_by(source: str) -> re.Pattern[str]:
    """Every string and name of a script; within an f-string anything may stand for a value."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.JoinedStr(values=parts):
                found.add("".join(re.escape(str(p.value)) if isinstance(p, ast.Constant) else r"\w+" for p in parts))
            case ast.Constant(value=str(text)):
                found.add(re.escape(text))
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                found.add(name)
    return re.compile("|".join(found - {r"\w+"}))


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/results.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("results")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/parts.py."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("parts")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_named_commit_has_the_script_that_made_it(path: Path, parts: ModuleType):
    content = json.loads(path.read_text(encoding="utf-8"))
    about = content.pop("provenance")
    source = git("show", f"{about['commit']}:{about.get('script', parts.script(path.stem))}")
    recipe = {field.name for field in fields(onehour.Recipe)} | {*content.get("packages", {})}
    if path.stem != "faults":  # whose campaigns bring their own names and commits
        written = written_by(
            "\n".join([source, *(git("show", f"{about['commit']}:{one}") for one in imported(source))])
        )
        assert [k for k in keys(content) if not (k.isdecimal() or k in recipe or written.fullmatch(k))] == []
    if "script_blob" in about:
        assert git("rev-parse", f"{about['commit']}:{about['script']}") == about["script_blob"]
        assert git("rev-parse", f"{about['commit']}:src") == about["source"]
    else:  # from before uncommitted states were refused
        assert about["uncommitted_changes"] is False


@pytest.fixture
def clone(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository that results.py takes for the project's."""
    for name in ("src/a.py", "benchmarks/b.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1\n")
    (tmp_path / "benchmarks" / "results").mkdir()
    for name in ("campaigns/x", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    git("init", "-q", cwd=tmp_path)
    git("add", "-A", cwd=tmp_path)
    git(*author, "commit", "-qm", "one", cwd=tmp_path)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(results, "_COMMIT_AT_START", git("rev-parse", "HEAD", cwd=tmp_path))
    monkeypatch.setattr(results, "_DIRTY_AT_START", False)
    return tmp_path


def test_a_result_of_a_committed_state_names_it(results: ModuleType, clone: Path):
    path = results.write(str(clone / "benchmarks" / "b.py"), "b", {"rows": []})
    about = json.loads(path.read_text())["provenance"]
    assert path.name == "b.json"
    assert about["commit"] == git("rev-parse", "HEAD", cwd=clone)
    assert about["script_blob"] == git("hash-object", "benchmarks/b.py", cwd=clone)
    assert (results.write(str(clone / "benchmarks" / "b.py"), "b", {"rows": []})).name == "b.json", "results may differ"


@pytest.mark.parametrize("changed", ["src/a.py", "src/new.npz", "benchmarks/b.py", "constraints.txt"])
def test_what_an_uncommitted_state_measured_is_a_draft(
    results: ModuleType, clone: Path, changed: str, capsys: pytest.CaptureFixture[str]
):
    (clone / changed).write_text("2\n")
    path = results.write(str(clone / "benchmarks" / "b.py"), "b", {"rows": []})
    assert path.name == "b.draft.json"
    assert "Commit, and run the script again" in capsys.readouterr().out


def test_what_began_uncommitted_or_on_another_commit_is_a_draft(
    results: ModuleType, clone: Path, monkeypatch: pytest.MonkeyPatch
):
    script = str(clone / "benchmarks" / "b.py")
    monkeypatch.setattr(results, "_DIRTY_AT_START", True)
    assert results.write(script, "b", {}).name == "b.draft.json"
    monkeypatch.setattr(results, "_DIRTY_AT_START", False)
    monkeypatch.setattr(results, "_COMMIT_AT_START", "0" * 40)
    assert results.write(script, "b", {}).name == "b.draft.json"


def test_a_folder_of_runs_belongs_to_one_state_of_the_code(results: ModuleType, clone: Path):
    script, runs = str(clone / "benchmarks" / "b.py"), clone / "runs"
    results.claim(runs, script)
    assert not runs.exists(), "a sweep wants to make its folder itself"
    runs.mkdir()
    results.claim(runs, script)
    (clone / "src" / "a.py").write_text("2\n")
    with pytest.raises(SystemExit, match=r"commit these first.*src/a\.py"):
        results.claim(runs, script)
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "two", cwd=clone)
    with pytest.raises(SystemExit, match="was begun at commit"):
        results.claim(runs, script)
    runs.rmdir()
    results.claim(runs, script)

"""The two ImageNet loops: they run as they stand, and adopting the rules changes little."""

import ast
import difflib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("forked")

EXAMPLES = Path(__file__).parents[1] / "examples"
STOCK, OURS = (EXAMPLES / f"imagenet_{name}.py" for name in ("stock", "onehour"))
LINE = re.compile(r"epoch (\d+)  loss (\S+)  validation error (\S+) %  next rate (\S+)")


def start(script: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(script), "--loaders", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_both_run_and_the_rate_is_each_ones_own():
    started = [start(script, "--fake", "600", "--batch-size", "512", "--epochs", "2") for script in (STOCK, OURS)]
    printed = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    stock, ours = ([match.groups() for match in LINE.finditer(text)] for text in printed)
    assert [epoch for epoch, *_ in stock] == [epoch for epoch, *_ in ours] == ["1", "2"]
    assert [float(rate) for *_, rate in stock] == [0.1, 0.1]
    # 512 images: from 0.1 to 0.2 in 5 epochs; the first iterations that end past 600 and 1,200 are the 2nd and 3rd.
    assert [float(rate) for *_, rate in ours] == pytest.approx(
        [0.1 + 0.1 * t * 512 / 600 / 5 for t in (2, 3)], rel=1e-4
    )


def test_a_batch_that_is_no_whole_number_of_workers_is_refused():
    process = start(OURS, "--fake", "600", "--batch-size", "48")
    assert "use 32 or 64" in process.communicate()[0]
    assert process.returncode == 1


def code(path: Path) -> list[str]:
    """The lines that do something: without docstring, imports, comments and blank lines."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Expr) and node.lineno == 1):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)  # pyright: ignore
    bare = [re.sub(r"\s+# .*$", "", line) for line in lines]
    return [line for line in bare if line.strip() and not line.strip().startswith("#")]


def test_adopting_the_rules_changes_little():
    changes = [line for line in difflib.ndiff(code(STOCK), code(OURS)) if line[:2] in ("+ ", "- ")]
    assert 0 < sum(line.startswith("+") for line in changes) <= 12
    assert 0 < sum(line.startswith("-") for line in changes) <= 12
    assert len(STOCK.read_text(encoding="utf-8").splitlines()) <= 120


def test_every_change_names_the_papers_section():
    """In a comment on the line or above its group of lines."""
    added = {line[2:].strip() for line in difflib.ndiff(code(STOCK), code(OURS)) if line.startswith("+ ")}
    lines = [line.strip() for line in OURS.read_text(encoding="utf-8").splitlines()]
    for number, line in enumerate(lines):
        bare = re.sub(r"\s+# .*$", "", line)
        if bare not in added or bare.startswith("#"):
            continue
        above = number
        while lines[above - 1].split("  # ")[0] in added:
            above -= 1
        assert "§" in line or (lines[above - 1].startswith("#") and "§" in lines[above - 1]), line

"""`onehour check` on the command line: what it prints, and how it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest

from onehour.cli import main

KEYS = ["pitfall", "severity", "measured", "expected", "where", "section", "remedy", "write"]


@pytest.mark.usefixtures("started")
def test_a_finding_is_a_table_and_leaves_with_1(loops: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(loops / "double-step_broken.py")]) == 1
    said = capsys.readouterr().out
    assert "error  double-step  " in said
    for word in ("measured", "expected", "why", "§2.1", "remedy"):
        assert word in said
    assert said.splitlines()[-1].endswith("double-step_broken.py: 1 finding")


@pytest.mark.usefixtures("started")
def test_nothing_found_leaves_with_0(loops: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["check", str(loops / "double-step_fixed.py")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("double-step_fixed.py: nothing found")


@pytest.mark.usefixtures("started")
def test_what_cannot_be_run_leaves_with_2_and_says_why(tmp_path: Path, refused: Any):
    (tmp_path / "train.py").write_text("print('hello')")
    assert "ended without a step of a torch optimizer" in refused(["check", str(tmp_path / "train.py")])
    assert "there is no script" in refused(["check", str(tmp_path / "nowhere.py")])


@pytest.mark.usefixtures("started")
def test_json_is_a_list_of_findings_alone(loops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    script = loops / "lr-not-scaled_broken.py"
    base = ["--base-lr", "0.1", "--base-minibatch", "16"]
    assert main(["check", str(script), *base, "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert list(finding) == KEYS
    assert finding["pitfall"] == "lr-not-scaled"
    assert finding["measured"] == "target rate 0.1 at minibatch 64"
    assert finding["where"].startswith(f"{script}:")
    assert finding["write"] == ["lr = onehour.linear_scaling(0.1, 16, 64)", "lr = 0.1 * 64 / 16  # without onehour"]
    assert main(["check", str(script), *base, "--json", "--skip", "lr-not-scaled"]) == 0
    assert json.loads(capsys.readouterr().out) == []


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("options", [[], ["--base-weight-decay", "0.1", "--limit", "60"]])
def test_the_script_s_own_arguments_come_behind_two_dashes(
    options: list[str], loops: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = (loops / "double-step_fixed.py").read_text(encoding="utf-8")
    script = tmp_path / "train.py"
    script.write_text("import sys\nassert sys.argv[1:] == ['--lr', '3', '--json'], sys.argv\n" + text, encoding="utf-8")
    assert main(["check", str(script), *options, "--", "--lr", "3", "--json"]) == 0
    assert "nothing found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "double-stp"], "no pitfall is called 'double-stp'; expected 'double-step'"),
        (["--limit", "0"], "--limit"),
        (["--base-minibatch", "many"], "many"),
    ],
)
def test_wrong_options_are_refused_in_a_line(loops: Path, arguments: list[str], said: str, refused: Any):
    assert said in refused(["check", str(loops / "double-step_fixed.py"), *arguments])

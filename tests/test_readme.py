"""The code in README.md, docs/rules.md and docs/reference.md runs, and the commands there print what they say."""

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from onehour.cli import main, make_parser
from onehour.cli.parser import parse
from onehour.models.resnet import resnet8

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(page: str, given: dict[str, Any]) -> dict[str, Any]:
    """All python blocks of a page, one after the other in one namespace, in an empty folder."""
    names = dict(given)
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def test_the_readmes_code_runs_in_the_loop_of_a_user(alone: Path):
    dataset = TensorDataset(torch.randn(600, 1, 8, 8), torch.randint(0, 10, (600,)))
    names = run("README.md", {"model": resnet8(), "dataset": dataset, "rank": 3, "world_size": 16})
    images, labels = next(iter(names["loader"]))
    assert images.shape[0] == len(labels) == 32
    assert names["scheduler"].get_last_lr() == [0.1, 0.1]
    names["optimizer"].step()
    names["scheduler"].step()
    assert names["scheduler"].get_last_lr() == pytest.approx([0.1 + 0.1 * 512 / 600 / 5] * 2, abs=1e-15)


def test_the_references_code_plans_and_trains(alone: Path, capsys: pytest.CaptureFixture[str]):
    run("docs/reference.md", {})
    assert "3.2 η̂ = η · kn/256 2.1" in capsys.readouterr().out
    assert (alone / "runs" / "short" / "summary.json").exists()


def test_the_adoption_is_five_statements():
    code = blocks("README.md", "python")[0].split("\n\n")[1]
    assert len(ast.parse(code).body) == 5


def test_each_rules_code_runs(alone: Path):
    assert run("docs/rules.md", {})


def shown_run(page: str, name: str) -> tuple[list[str], str]:
    """The arguments and the output of the command that a page shows a run of."""
    for block in blocks(page, "console"):
        command, _, printed = block.partition("\n")
        program, *arguments = command.removeprefix("$ ").split()
        assert program == "onehour"
        if arguments[0] == name:
            return arguments, printed
    raise AssertionError(f"{page} shows no run of {name}")


def test_what_plan_prints_is_what_the_reference_says(capsys: pytest.CaptureFixture[str]):
    arguments, printed = shown_run("docs/reference.md", "plan")
    assert main(arguments) == 0
    assert capsys.readouterr().out == printed


def test_what_check_prints_is_what_the_readme_says(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    arguments, printed = shown_run("README.md", "check")
    monkeypatch.chdir(ROOT / "examples")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(arguments) == 1
    said = capsys.readouterr().out
    begins, ends = printed.split("…\n")
    assert said.startswith(begins)
    assert said.endswith(ends)


def test_every_command_in_the_readme_and_the_reference_can_be_parsed():
    rows = re.findall(r"^\|.*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    starts = re.findall(r"`onehour ([^`]+)`", "".join(rows))
    assert {start.split()[0] for start in starts} == {"check", "train", "plan", "sweep", "predict"}
    lines = "".join(blocks("README.md", "sh") + blocks("docs/reference.md", "sh")).splitlines()
    shown = [line.partition("onehour ")[2].partition("  #")[0] for line in lines if " onehour " in f" {line}"]
    assert {command.split()[0] for command in shown} >= {"train", "plan", "verify", "evaluate", "export"}
    for command in (each.split() for each in [*starts, *shown]):
        assert callable(parse(make_parser(), command).command)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_target_exists(page: str):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = re.findall(r"^make ([a-z-]+)", "".join(blocks(page, "sh")), re.MULTILINE)
    assert named
    assert set(named) <= set(targets)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "examples/README.md", "docs/reference.md", "docs/rules.md"]
)
def test_links_lead_somewhere(page: str):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        leads_to = (ROOT / page).parent / path if path else ROOT / page
        assert os.path.exists(leads_to), target
        assert not anchor or anchor in anchors(leads_to), target


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_readme_has_at_most_1200_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200

"""`onehour verify` and what it proves."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from onehour.cli import main
from onehour.config import Recipe
from onehour.dist.group import Group
from onehour.dist.launch import LaunchError
from onehour.recipes import digits
from onehour.sweeps.verify import MODES, compare, trace

pytestmark = pytest.mark.usefixtures("forked")

HELPERS = Path(__file__).parent / "helpers"


@pytest.fixture
def traced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """What one process held in three iterations, written again as if two had."""
    trace(digits(minibatch=64), steps=3, group=Group(), folder=tmp_path)
    for mode, precision in MODES:
        for suffix in ("json", "safetensors"):
            name = f"{mode}-{precision}.{suffix}"
            (tmp_path / f"p2-{name}").write_bytes((tmp_path / f"p1-{name}").read_bytes())
    return tmp_path


def edit(folder: Path, name: str, tensor: str, by: float, iteration: int) -> None:
    """Let two processes differ in one tensor from an iteration on."""
    state = load_file(folder / f"p2-{name}.safetensors")
    state[tensor] = state[tensor] + by
    save_file(state, folder / f"p2-{name}.safetensors")
    content = json.loads((folder / f"p2-{name}.json").read_text())
    content["sha256"] = "another"
    for held in content["iterations"][iteration:]:
        held[tensor] = ["another", held[tensor][1] + by]
    (folder / f"p2-{name}.json").write_text(json.dumps(content))


def test_equal_traces_hold(traced: Path):
    findings = compare(traced, [1, 2])
    assert [finding.holds for finding in findings] == [True, None, True]
    assert all(finding.difference == 0 for finding in findings)


@pytest.mark.parametrize(("name", "number"), [("fast-float64", 0), ("canonical-float32", 2)])
def test_a_failed_claim_names_the_first_tensor_and_iteration(traced: Path, name: str, number: int):
    edit(traced, name, "layer2.0.bn1.running_var", by=1e-6, iteration=1)
    finding = compare(traced, [1, 2])[number]
    assert finding.holds is False
    assert finding.first == "layer2.0.bn1.running_var at iteration 1, 2 processes against 1"
    assert finding.difference == pytest.approx(1e-6, rel=0.2)


def test_float32_that_differs_in_its_last_bits_is_no_failure(traced: Path):
    edit(traced, "fast-float32", "fc.weight", by=1e-6, iteration=2)
    assert compare(traced, [1, 2])[1].holds is None


def test_both_claims_hold_here(capsys: pytest.CaptureFixture[str]):
    assert main(["verify", "digits", "--processes", "1,2", "--steps", "3", "--device", "cpu", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [finding["holds"] for finding in content["findings"]] == [True, None, True]
    assert len(set(content["findings"][2]["sha256"].values())) == 1
    assert content["findings"][0]["difference"] < 1e-12


def test_workers_that_share_a_pass_have_one_sum_on_any_number_of_processes_up_to_their_passes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    found = []
    for together in (1, 4):
        path = tmp_path / f"{together}.toml"
        path.write_text(digits(minibatch=192, canonical_pass=together).to_toml())
        assert main(["verify", str(path), "--processes", "1,3", "--steps", "3", "--device", "cpu", "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        found.append(set(content["findings"][2]["sha256"].values()))
    assert [len(sums) for sums in found] == [1, 1]
    assert found[0] != found[1], "passes of other sizes have other bits"


@pytest.mark.parametrize("scaling", ["linear", "sqrt"])
def test_a_minibatch_that_grows_for_the_processes_does_not_ask_for_a_rule_that_fails_there(
    tmp_path: Path, scaling: str, monkeypatch: pytest.MonkeyPatch
):
    launched: list[Recipe] = []

    def launch(command: list[str], **options: Any) -> None:
        launched.append(Recipe.from_toml(Path(command[1]) / "recipe.toml"))
        raise LaunchError("enough", 7)

    monkeypatch.setattr("onehour.cli.verify.launch", launch)
    path = tmp_path / "mine.toml"
    path.write_text(digits(optimizer="adamw", base_lr=1e-3, scaling=scaling).to_toml())
    assert main(["verify", str(path), "--processes", "1,32", "--steps", "1", "--device", "cpu"]) == 7
    assert (launched[0].minibatch, launched[0].target_lr) == (512, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [4, 5, 8, 12])
def test_canonical_bits_are_equal_on_one_to_four_processes(workers: int, capsys: pytest.CaptureFixture[str]):
    command = ["verify", "digits", "--processes", "1,2,3,4", "--minibatch", str(16 * workers), "--steps", "10"]
    assert main([*command, "--device", "cpu"]) == 0
    assert "one SHA-256" in capsys.readouterr().out


@pytest.mark.slow
def test_canonical_bits_are_equal_for_a_resnet18(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(HELPERS)
    command = ["verify", "--model", "rgbtask:net", "--data", "rgbtask:data", "--minibatch", "16", "--per-worker", "4"]
    assert main([*command, "--processes", "1,2,3,4", "--steps", "3", "--device", "cpu"]) == 0
    assert "one SHA-256" in capsys.readouterr().out

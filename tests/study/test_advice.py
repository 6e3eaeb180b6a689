"""`onehour advise`, from runs that nothing trained: what it says, what it rests on, and when it cannot say anything."""

import json
from pathlib import Path
from typing import Any

import pytest
import studies

from onehour.cli import main
from onehour.study import outcome
from onehour.study.outcome import outcome_lines
from onehour.training.record import Run

POINTS = [[10.0 * number, 20.0 + number % 3, 0.05 + 0.01 * (number % 2)] for number in range(12)]
"""B is 21 / .055."""


def run(tmp_path: Path, points: list[list[float]], *, outcome: str = "finished", **changes: Any) -> Path:
    folder = tmp_path / "run"
    return studies.write_run(folder, studies.BASE.replace(**changes), 3.6, outcome=outcome, noise=points)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["advise", *arguments]) == 0
    heard = capsys.readouterr()
    assert heard.err == ""
    return heard.out


def test_it_says_the_minibatch_what_it_rests_on_and_how_sure_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = said(capsys, str(run(tmp_path, POINTS))).splitlines()
    assert lines[0] == "noise scale  382 samples (95 %: 358 to 408)"
    assert lines[1].startswith("rests on     12 points at the peak rate: tr Σ = 21, |G|² = 0.055 ± 0.0015")
    assert lines[2] == "advice       the linear rule should hold to minibatch 256 (8×)"
    assert "within a factor of 2" in lines[3]


def test_the_interval_is_said_where_it_leads_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wide = [[t, trace, square + 0.04 * (-1) ** (t // 20)] for t, trace, square in POINTS]
    assert "256 (8×); by the interval to 256 … 512" in said(capsys, str(run(tmp_path, wide)))


def test_a_noise_scale_below_the_base_leaves_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    loud = [[t, trace / 100, square] for t, trace, square in POINTS]
    assert "should hold to minibatch 32 (1×)" in said(capsys, str(run(tmp_path, loud)))


def test_a_trace_below_zero_is_no_noise_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = said(capsys, str(run(tmp_path, [[t, -trace, square] for t, trace, square in POINTS])))
    assert "not estimable: tr Σ is not above zero\n" in text
    assert "none is possible" in text


def test_what_cannot_be_estimated_is_bounded_from_below(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lost = [[t, trace, square - 0.05 + 0.1 * (-1) ** (t // 10)] for t, trace, square in POINTS]
    folder = str(run(tmp_path, lost))
    text = said(capsys, folder)
    assert "not estimable: |G|² does not exceed its own error; above " in text
    assert "should hold to minibatch 256 at least" in text
    found = json.loads(said(capsys, folder, "--json"))
    assert found["noise_scale"] is None
    assert found["holds_to"] is None
    assert found["holds_to_low"] == 256


def test_it_says_the_ramp_by_which_a_run_may_come_to_a_minibatch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Drops to a tenth at 8, 16 and 64/3: from 256 on, that is all the linear rule holds to, ten times as much each."""
    folder = str(run(tmp_path, POINTS))
    lines = said(capsys, folder, "--minibatch", "2k").splitlines()
    assert lines[4] == "ramp         --minibatch 2048 --ramp 256:8"
    assert json.loads(said(capsys, folder, "--minibatch", "4096", "--json"))["ramp"] == ["256:8", "2048:16"]
    assert "--minibatch 256: none is needed" in said(capsys, folder, "--minibatch", "256")
    assert Run(Path(folder)).recipe.replace(minibatch=4096, ramp=("256:8", "2048:16")).ramp == ("256:8", "2048:16")


def test_a_phase_lasts_where_a_drop_is_no_doubling(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = str(run(tmp_path, POINTS, decay_factor=0.8))
    assert said(capsys, folder, "--minibatch", "512").splitlines()[4].endswith("--ramp 256:16")
    assert main(["advise", folder, "--minibatch", "1024"]) == 2
    assert "after the last drop of the rate the rule should hold to 512; ask for at most" in capsys.readouterr().err


def test_no_ramp_is_advised_without_a_noise_scale_or_drops(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lost = [[t, trace, square - 0.05 + 0.1 * (-1) ** (t // 10)] for t, trace, square in POINTS]
    assert main(["advise", str(run(tmp_path, lost)), "--minibatch", "1024"]) == 2
    assert "no ramp can be advised: the noise scale is not estimable" in capsys.readouterr().err
    assert main(["advise", str(run(tmp_path / "cosine", POINTS, decay="cosine")), "--minibatch", "1024"]) == 2
    assert "no ramp reaches minibatch 1024" in capsys.readouterr().err


def test_json_has_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = str(run(tmp_path, POINTS))
    found = json.loads(said(capsys, folder, "--json"))
    assert found["run"] == folder
    assert (found["base_minibatch"], found["points"], found["holds_to"]) == (32, 12, 256)
    assert found["noise_scale"] == pytest.approx(21 / 0.055)
    assert found["low"] < found["noise_scale"] < found["high"]


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ([], {}, "has no gradient noise recorded; train it with --noise"),
        (POINTS[:7], {}, "has 7 points of gradient noise, and an interval needs 8: its iterations at the peak rate"),
        (POINTS[:1], {"outcome": "unfinished"}, "has 1 point of gradient noise, and an interval needs 8: let it go on"),
        (POINTS, {"minibatch": 64}, "is a run at minibatch 64; what predicts where the rule ends is the noise at the"),
        (POINTS, {"optimizer": "adam"}, "was trained with adam, for which the linear rule does not hold"),
        ([[1.0, 2.0]], {}, "noise is [[1.0, 2.0]]; expected lists of 3 numbers"),
    ],
)
def test_what_it_cannot_tell_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], points: Any, options: dict[str, Any], message: str
):
    folder = run(tmp_path, points, **options)
    assert main(["advise", str(folder)]) == 2
    heard = capsys.readouterr()
    assert heard.out == ""
    (line,) = heard.err.splitlines()
    assert message in line
    assert str(folder) in line


def test_a_run_that_measured_it_ends_with_it_and_others_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outcome, "draw_curve", lambda run: None)
    lines = [line.split("  ")[0] for line in outcome_lines(Run(run(tmp_path, POINTS)))]
    assert lines[-4:] == ["noise scale", "advice", "run", "curve"]
    plain = studies.write_run(tmp_path / "plain", studies.BASE, 3.6)
    assert "noise scale" not in [line.split("  ")[0] for line in outcome_lines(Run(plain))]

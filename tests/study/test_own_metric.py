"""Runs whose metric is their task's own: name, unit and which way it is better, in everything that a report says."""

import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import studies

from onehour.cli import main
from onehour.config import Recipe
from onehour.data.sources import complete
from onehour.entry import asked_for
from onehour.execution import Execution
from onehour.recipes import digits
from onehour.study.curves import curve_pictures
from onehour.study.figures import arm_pictures, minibatch_picture, per_worker_pictures, seconds_picture
from onehour.study.findings import Findings, findings_of
from onehour.study.outcome import outcome_lines
from onehour.study.report import results_csv, results_json, write_report
from onehour.study.results import Point, Result, read_csv, read_paths, study_of
from onehour.study.spec import Arm, SweepSpec
from onehour.study.verdict import State
from onehour.study.wording import headline
from onehour.sweeps.task import Task, run_task
from onehour.training.record import Metric, Run

pytestmark = pytest.mark.usefixtures("quick")

TASKS = Path(__file__).parents[2] / "examples" / "tasks"
PAIRS = Recipe.from_toml(TASKS / "pairs.toml").replace(epochs=6, samples=600, warmup_epochs=1, milestones=("4",))
Outcome = Literal["finished", "non-finite"]
IN_PLACE, DISTANCE = "pairs in place %", "distance [m]"


def write_run(
    folder: Path,
    values: Sequence[float | None],
    *,
    metric: str = IN_PLACE,
    untrained: float | None = 50.0,
    higher: bool = True,
    minibatch: int = 8,
    seed: int = 0,
) -> Path:
    """A finished run of a task of one's own, which ends with these values."""
    recipe = PAIRS.replace(minibatch=minibatch, seed=seed)
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    better = {"higher_is_better": [metric]} if higher else {}
    found = [untrained, *[None] * (int(recipe.epochs) - len(values)), *values]
    lines = [
        {"epoch": epoch, "iteration": epoch, "metrics": {metric: value}, "train_metrics": {metric: value}, **better}
        for epoch, value in enumerate(found)
    ]
    text = "\n".join(json.dumps(line) for line in [{"recipe": recipe.as_dict()}, *lines])
    (folder / "metrics.jsonl").write_text(text + "\n", encoding="utf-8")
    summary = {"outcome": "finished", "last_errors": [line["metrics"][metric] for line in lines][-5:]}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def write_pairs(path: Path, large: Sequence[float]) -> list[Path]:
    """Runs at minibatch 8, of 90 ± 0.1, and at 40 of these ends."""
    ends = [(8, end) for end in (89.9, 90.0, 90.1)] + [(40, end) for end in large]
    return [
        write_run(path / str(seed), [end] * 5, minibatch=minibatch, seed=seed)
        for seed, (minibatch, end) in enumerate(ends)
    ]


def said(findings: Findings) -> str:
    return " ".join(sentence.text for sentence in headline(findings))


def test_a_trained_sweep_has_its_metrics_name_and_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.syspath_prepend(TASKS)
    recipe = Recipe.from_toml(TASKS / "regression.toml").replace(epochs=2, warmup_epochs=1, milestones=("1.5",))
    recipe = complete(asked_for(recipe, trust=True))[0]
    spec = SweepSpec(recipe=recipe, minibatches=(8, 40), seeds=(0, 1), arms=(), arms_at=())
    spec.write(tmp_path)
    cells = list(spec.cells())
    folders = tuple(tmp_path / "cells" / cell.name for cell in cells)
    run_task(Task(tuple(cell.recipe for cell in cells), folders), Execution(device="cpu", threads=1), lambda: False)
    sys.modules.pop("regression")
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--margin", "0.02"]) == 0
    printed = capsys.readouterr().out
    errors = [Run(folder).final_error for folder in folders]
    assert f"{(errors[0] + errors[1]) / 2:.3f} ± " in printed
    assert " m (2 seeds)" in printed
    page, data = ((tmp_path / name).read_text(encoding="utf-8") for name in ("report.html", "results.json"))
    assert "distance, m" in page
    assert "Distance against minibatch" in page
    for text in (printed, page.partition("</style>")[2].partition("The recipe")[0], data):
        assert "top-1" not in text
        assert "error, %" not in text
    content = json.loads(data)
    assert content["metric"] == {"name": "distance", "unit": "m", "higher_is_better": False}
    assert [entry["mean"] for entry in content["entries"]] == pytest.approx([sum(errors[:2]) / 2, sum(errors[2:]) / 2])
    lines = list(csv.DictReader((tmp_path / "results.csv").read_text(encoding="utf-8").splitlines()))
    assert {(line["metric"], line["higher_is_better"]) for line in lines} == {("distance [m]", "false")}


@pytest.mark.parametrize(
    ("large", "state", "text"),
    [
        ((84.9, 85.0, 85.1), "beyond", "the pairs in place is worse by +5.00 [+4.83, +5.17] points, beyond the margin"),
        ((94.9, 95.0, 95.1), "within", "the pairs in place stays within 1 points of minibatch 8’s 90.00 ± 0.10 %"),
        ((49.0, 85.0, 85.1), "broke", "they diverged, or ended no better than before training"),
    ],
)
def test_where_higher_is_better_to_fall_is_worse(tmp_path: Path, large: Sequence[float], state: State, text: str):
    findings = findings_of(read_paths(write_pairs(tmp_path, large)), margin=1.0)
    reference, row = findings.sizes
    assert row.state == state
    assert text in said(findings)
    assert (reference.entry.mean, row.entry.mean) == pytest.approx((90.0, sum(large) / 3))  # as they are
    assert row.cost == pytest.approx(90.0 - sum(large) / 3)


def test_where_higher_is_better_figures_show_values_as_they_are_and_worse_higher(tmp_path: Path):
    report = write_report(write_pairs(tmp_path / "runs", (60.0, 85.0, 85.1)), tmp_path / "out", margin=1.0)
    figure = (tmp_path / "out" / "figures" / "error-against-minibatch.svg").read_text(encoding="utf-8")
    assert all(f">{text}<" in figure for text in ("90.00", "−1", "90", "76.7"))
    assert "−90" not in figure
    assert "Less is worse, and drawn higher." in report.page.read_text(encoding="utf-8")


def test_every_figure_says_the_metric(tmp_path: Path):
    metric = Metric("distance", "m")
    curve = tuple(Point(float(epoch), 1.0 / epoch, 0.9 / epoch) for epoch in range(1, 7))

    def runs(end: float, minibatch: int, arm: Arm = (), outcome: Outcome = "finished") -> list[Result]:
        ends = [end + 0.01 * seed for seed in range(3)]
        own: dict[str, Any] = {"curve": curve, "seconds": 400 / minibatch, "metric": metric, "untrained": 2.0}
        return [Result("run", arm, minibatch, seed, outcome, end, **own) for seed, end in enumerate(ends)]

    sizes = [(("per_worker", str(n)),) for n in (2, 4, 20)]
    arms = [result for number, arm in enumerate(sizes) for result in runs(0.2 + 0.1 * number, 40, arm)]
    lost = runs(2.0, 40, (("warmup", "none"),), "non-finite")
    findings = findings_of(study_of([*runs(0.2, 8), *runs(0.21, 40), *arms, *lost], PAIRS), margin=0.05)
    parts = (minibatch_picture, seconds_picture, arm_pictures, per_worker_pictures, curve_pictures)
    pictures = [picture for part in parts for picture in part(findings)]
    words = [" ".join([picture.title, picture.caption, *picture.notes]) for picture in pictures]
    svgs = [picture.inline("wide", {}) for picture in pictures]
    assert len(pictures) == 6
    assert not [text for text in (*words, *svgs) if "top-1" in text or "%" in text or "chance" in text]
    assert all("distance" in text for text in words)
    assert "At minibatch 40, where the recipe has distance 0.220 m, " in words[2]
    assert "the costliest, in m: no warmup (+1.790)" in words[2]
    assert "each counts as its untrained network and is marked with a cross" in words[2]
    assert "scored as untrained" in svgs[2]


def test_a_run_that_is_not_finite_counts_as_its_untrained_network(tmp_path: Path):
    path = write_run(tmp_path / "lost", [None] * 5, untrained=51.0)
    (result,) = read_paths([path]).results
    assert (result.outcome, result.error) == ("non-finite", 51.0)
    with pytest.raises(
        ValueError, match="pairs in place % of its untrained network, which it counts as, is not finite"
    ):
        read_paths([write_run(tmp_path / "neither", [None] * 5, untrained=None)])


def test_a_task_on_named_data_is_not_compared_with_the_error_of_its_reference(tmp_path: Path):
    run = write_run(tmp_path / "run", [90.0] * 5)
    (run / "recipe.toml").write_text(digits(task=PAIRS.task, classes=10).to_toml(), encoding="utf-8")
    assert not any(line.startswith(("reference", "verdict")) for line in outcome_lines(Run(run)))


def test_values_whose_squares_no_float_holds_are_reported(tmp_path: Path):
    ends = [(32, 1.0), (32, 1.1), (64, 1.0), (64, 1e300)]
    paths = [
        studies.write_csv(tmp_path / f"{seed}.csv", [end] * 5, metric="perplexity", minibatch=size, seed=seed)
        for seed, (size, end) in enumerate(ends)
    ]
    report = write_report(paths, tmp_path / "report", margin=0.5)
    assert [row.state for row in report.findings.sizes] == ["reference", "undecided"]


def test_metrics_are_not_mixed(tmp_path: Path):
    paths = [write_run(tmp_path / "a", [90.0] * 5), write_run(tmp_path / "b", [1.0] * 5, metric=DISTANCE, seed=1)]
    with pytest.raises(ValueError, match=r"different metrics cannot be compared; report them separately"):
        read_paths(paths)
    lower = write_run(tmp_path / "c", [90.0] * 5, higher=False, seed=1)
    with pytest.raises(ValueError, match=r"a has pairs in place %, of which more is better, and .*c pairs in place %:"):
        read_paths([paths[0], lower])


def test_a_csv_of_any_numbers(tmp_path: Path):
    kinds = {"metric": "perplexity"}
    paths = [
        studies.write_csv(tmp_path / f"{size}-{seed}.csv", [9000, 2000, end + seed], minibatch=size, seed=seed, **kinds)
        for size, end in ((32, 1200), (64, 1500))
        for seed in range(3)
    ]
    findings = findings_of(read_paths(paths), margin=100)
    assert findings.metric == Metric("perplexity")
    # The median of three lines.
    assert [row.entry.mean for row in findings.sizes] == [2000, 2000]
    assert (
        "Train at minibatch 64 (2×), the largest tried, or below: up to there the perplexity stays within 100 of"
        in said(findings)
    )
    assert "2000 ± 0 (3 seeds)" in said(findings)
    assert [entry["mean"] for entry in json.loads(results_json(findings))["entries"]] == [2000, 2000]
    assert results_csv(findings).splitlines()[1].endswith("32-0.csv,perplexity,false")


@pytest.mark.parametrize(
    ("columns", "errors", "text"),
    [
        ({"metric": DISTANCE}, [1, math.inf], "line 3: error is 'inf'; expected a finite number"),
        ({"metric": DISTANCE, "higher_is_better": "yes"}, [1], "higher_is_better is 'yes'; expected true or false"),
    ],
)
def test_bad_csvs_of_a_metric(tmp_path: Path, columns: dict[str, str], errors: list[float], text: str):
    with pytest.raises(ValueError, match=text):
        read_csv(studies.write_csv(tmp_path / "a.csv", errors, **columns))


def test_a_metric_of_ones_own_needs_a_margin(tmp_path: Path):
    path = studies.write_csv(tmp_path / "a.csv", [3, 2, 1], metric=DISTANCE, higher_is_better="true", minibatch=32)
    result = read_csv(path)
    assert (result.metric.higher_is_better, result.cost) == (True, -2.0)
    with pytest.raises(ValueError, match=r"distance \[m\] has no usual margin: say with --margin in m how much worse"):
        findings_of(study_of([result], None))


def test_a_sweep_asks_for_the_margin_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any):
    monkeypatch.chdir(TASKS)
    out = tmp_path / "sweep"
    assert "say with --margin, in its unit" in refused(["sweep", "pairs.toml", "--trust", "--out", str(out)])
    assert not out.exists()

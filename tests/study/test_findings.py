"""A study judged: rows with verdicts, groups of arms, and the early sign, from a truth that is known."""

import math
from pathlib import Path

import pytest
import studies

from onehour.study.findings import Findings, Row, curve_of, early_gap, findings_of, mean_curve, sign_of
from onehour.study.results import Study, read_paths, read_study
from onehour.study.verdict import Sample, judge_arms, judge_minibatches

BASE = [(1.0, 50.0), (2.0, 40.0), (3.0, 30.0), (4.0, 20.0)]


def states(rows: tuple[Row, ...]) -> dict[str, str]:
    return {row.name: row.state for row in rows}


def test_it_holds_to_16_times_the_base_and_no_further(findings: Findings):
    assert states(findings.sizes) == {
        "32": "reference",
        **dict.fromkeys(("64", "128", "256", "512"), "holds"),
        "1024": "worse",
        "2048": "untested",
    }
    assert [row.name for row in findings.held] == ["64", "128", "256", "512"]
    failure = findings.first_failure
    assert failure is not None
    assert failure.name == "1024"
    assert failure.cost == pytest.approx(12.0 - 3.6)
    samples = {row.entry.minibatch or 0: Sample.of(row.entry.errors) for row in findings.sizes}
    expected = judge_minibatches(32, samples, 0.5)
    assert {row.entry.minibatch: row.verdict for row in findings.sizes if row.verdict} == expected


def test_each_question_is_its_own_family(findings: Findings):
    assert [kind for _, kind in findings.groups] == ["rate", "pitfall", "n"]
    assert [len(rows) for rows in findings.groups.values()] == [6, 9, 4]
    for rows in findings.groups.values():
        pairs = [(row.entry, findings.study.beside(row.entry)) for row in rows]
        samples = [(Sample.of(arm.errors), Sample.of(own.errors)) for arm, own in pairs if own]
        assert [row.verdict for row in rows] == judge_arms(samples, 0.5)
        assert [row.cost for row in rows] == sorted((row.cost for row in rows), reverse=True)


def test_the_costs_of_arms_are_those_that_were_written_and_the_papers_stand_beside(findings: Findings):
    for row in findings.arms:
        if row.entry.mean < 80:  # chance bounds the others
            assert row.cost == pytest.approx(studies.COSTS[row.entry.label], abs=1e-9), row.name
    found = {row.entry.label: round(row.paper, 2) for row in findings.arms if row.paper is not None}
    assert found == {
        "warmup=none": 1.10,
        "warmup=constant": 2.14,
        "scaling=fixed": 17.93,
        "scaling=sqrt": 2.48,
        "base_lr=0.1": 0.53,
        "base_lr=0.4": 0.31,
        "zero_gamma=false": 0.37,
    }


def test_rows_know_their_recipe(findings: Findings):
    rows = {row.entry.label: row.recipe for row in (*findings.arms, findings.sizes[-1])}
    whole, fixed, last = rows["per_worker=512"], rows["scaling=fixed"], rows[""]
    assert whole is not None
    assert whole.workers.workers == 1
    assert fixed is not None
    assert fixed.target_lr == 0.2
    assert last is not None
    assert (last.minibatch, last.target_lr, last.workers.workers) == (2048, 12.8, 128)


def test_the_early_sign_is_the_mean_gap_between_warmup_and_the_first_drop(findings: Findings):
    assert sign_of(findings.study.recipe) == (5.0, 8.0)
    rows = {row.name: row for row in findings.sizes}
    curve, base = (dict(curve_of(rows[name].entry, "train_error")) for name in ("1024", "32"))
    gap = sum(curve[epoch] - base[epoch] for epoch in (6, 7, 8)) / 3
    assert rows["1024"].early == pytest.approx(gap)
    assert rows["1024"].early > 10
    assert abs(rows["64"].early) < 1
    assert math.isnan(rows["32"].early)


def test_the_early_gap_counts_from_after_warmup_to_the_first_drop():
    curve = [(1.0, 90.0), (2.0, 80.0), (3.0, 32.0), (4.0, 23.0), (5.0, 99.0)]
    assert early_gap(curve, BASE, start=2, stop=4) == 2.5
    assert early_gap(curve, BASE, start=1, stop=3) == 21
    assert early_gap(BASE, curve, start=2, stop=4) == -2.5


def test_the_base_is_straight_between_its_epochs_and_nothing_outside():
    assert early_gap([(2.5, 36.0)], BASE, start=2, stop=4) == 1
    assert math.isnan(early_gap([(4.5, 36.0)], BASE, start=2, stop=9))
    assert math.isnan(early_gap(BASE, BASE, start=4, stop=9))
    assert math.isnan(early_gap(BASE, [], start=0, stop=9))


def test_curves_are_averaged_where_every_seed_has_been():
    assert mean_curve([[(2, 20.0), (1, 40.0)], [(1, 60.0), (2, 30.0), (3, 9.0)]]) == [(1, 50.0), (2, 25.0)]
    assert mean_curve([]) == []


def test_nothing_is_dropped(findings: Findings):
    last = findings.sizes[-1]
    assert (last.non_finite, last.entry.n) == (2, 5)
    assert last.entry.errors.count(90.0) >= 2
    assert len(last.seconds) == 3


def test_one_seed_has_no_verdict_and_no_arm_a_cost_without_the_recipe_beside_it(tmp_path: Path):
    changes: list[dict[str, object]] = [{}, {"minibatch": 128}, {"minibatch": 64, "warmup": "none"}]
    runs = [
        studies.write_run(tmp_path / str(number), studies.BASE.replace(**change), 4.0)
        for number, change in enumerate(changes)
    ]
    findings = findings_of(read_study(runs))
    (row,) = findings.arms
    assert (states(findings.sizes), row.state) == ({"32": "reference", "128": "one seed"}, "one seed")
    assert math.isnan(row.cost)


def test_the_margin_moves_the_verdict(study: Study):
    assert states(findings_of(study, 0.5).sizes)["512"] == "holds"
    assert states(findings_of(study, 0.05).sizes)["512"] != "holds"
    with pytest.raises(ValueError, match="margin"):
        findings_of(study, 0.0)


def test_others_runs_have_verdicts_without_a_recipe(tmp_path: Path):
    paths = [
        studies.write_csv(tmp_path / f"{size}-{seed}.csv", [50, 10 + seed / 10], minibatch=size, seed=seed)
        for size in (256, 512)
        for seed in range(5)
    ]
    findings = findings_of(read_paths(paths))
    assert states(findings.sizes) == {"256": "reference", "512": "holds"}
    assert findings.sizes[0].recipe is None


def test_a_study_without_a_minibatch_has_no_rows():
    findings = findings_of(Study(None, ()))
    assert (findings.sizes, findings.arms, findings.reference, findings.first_failure) == ((), (), None, None)


def test_an_unfinished_runs_half_is_no_part_of_the_mean_curve(tmp_path: Path):
    studies.write_sweep(tmp_path, seeds=3, minibatches=(32,), arms=(), unfinished=["32-s2"])
    entry = read_study([tmp_path]).flat[0]
    curve = curve_of(entry)
    assert len(curve) == 24
    last = [result.curve[-1].top1_error for result in entry.results[:2]]
    assert curve[-1] == (24, pytest.approx(sum(last) / 2))

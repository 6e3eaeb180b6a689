"""A study judged: rows with verdicts, groups of arms, and the early sign, from a truth that is known."""

import math
from pathlib import Path

import pytest
import studies

from onehour.study.findings import Findings, Row, curve_of, early_gap, findings_of, mean_curve, sign_of
from onehour.study.results import Entry, Result, Study, read_paths, read_study
from onehour.study.verdict import Sample, judge

BASE = [(1.0, 50.0), (2.0, 40.0), (3.0, 30.0), (4.0, 20.0)]


def states(rows: tuple[Row, ...]) -> dict[str, str]:
    return {row.name: row.state for row in rows}


def test_it_holds_to_16_times_the_base_and_no_further(findings: Findings):
    assert states(findings.sizes) == {
        "32": "reference",
        **dict.fromkeys(("64", "128", "256", "512"), "within"),
        "1024": "broke",
        "2048": "broke",
    }
    assert [row.name for row in findings.held] == ["64", "128", "256", "512"]
    failure = findings.first_failure
    assert failure is not None
    assert failure.name == "1024"
    assert failure.cost == pytest.approx(12.0 - 3.6)
    reference = Sample.of(findings.sizes[0].entry.errors)
    for row in findings.held:
        assert row.verdict == judge(Sample.of(row.entry.errors), reference)


def test_arms_are_judged_seed_by_seed_and_grouped_by_their_question(findings: Findings):
    assert [kind for _, kind in findings.groups] == ["rate", "pitfall", "n"]
    assert [len(rows) for rows in findings.groups.values()] == [6, 9, 4]
    for rows in findings.groups.values():
        for row in rows:
            own = findings.study.beside(row.entry)
            assert own is not None
            arm, recipe = (Sample.of(entry.errors, range(5)) for entry in (row.entry, own))
            assert row.state == "broke" or row.verdict == judge(arm, recipe, pair=True)
            assert row.verdict is not None
            assert row.verdict.paired == (row.state != "broke")
        assert [row.cost for row in rows] == sorted((row.cost for row in rows), reverse=True)


def test_a_verdict_is_the_same_alone_and_in_company(findings: Findings):
    """Of every arm and minibatch: what else was run does not count."""
    study = findings.study
    base, own = study.flat[0], next(entry for entry in study.flat if entry.minibatch == 512)
    for row in (*findings.arms, *findings.sizes[1:]):
        entries = {id(entry): entry for entry in (base, own, row.entry)}
        alone = findings_of(Study(study.recipe, tuple(entries.values())))
        (same,) = [other for other in (*alone.arms, *alone.sizes) if other.entry is row.entry]
        assert same.verdict == row.verdict, row.name


def test_the_rule_holds_up_to_the_first_that_is_not_within(study: Study):
    """512 is within a wide margin and 1024 is not, though 2048 may be."""
    flat = {entry.minibatch: entry for entry in study.flat}
    swapped = [Entry((), 2048, flat[64].results) if size == 2048 else entry for size, entry in flat.items()]
    findings = findings_of(Study(study.recipe, tuple(swapped)))
    assert states(findings.sizes)["2048"] == "within"
    assert [row.name for row in findings.held] == ["64", "128", "256", "512"]
    assert findings.first_failure is findings.sizes[5]


def test_a_run_breaks_when_it_diverges_or_ends_ten_margins_above_the_reference():
    def entry(size: int, *errors: float, lost: int = 0) -> Entry:
        runs = enumerate(errors)
        results = [Result("", (), size, n, "non-finite" if n < lost else "finished", error) for n, error in runs]
        return Entry((), size, tuple(results))

    base = entry(32, 3.0, 3.1, 90.0)
    for margin, broke in ((0.5, [1, 0, 1, 2]), (0.6, [1, 0, 0, 2])):
        rows = findings_of(
            Study(studies.BASE, (base, entry(64, 8.0, 8.1), entry(128, 8.2, 3.0), entry(256, 3.0, 9.2, lost=1))), margin
        ).sizes
        assert [row.broke for row in rows] == broke
        assert rows[3].state == "broke"
        assert rows[1].state == "no verdict"  # the reference broke


def test_the_costs_of_arms_are_those_that_were_written_and_the_papers_stand_beside(findings: Findings):
    for row in findings.arms:
        if row.entry.mean < 80:  # chance bounds the others
            assert row.cost == pytest.approx(studies.COSTS[row.entry.label], abs=1e-9), row.name
    found = {row.entry.label: round(row.paper, 2) for row in findings.arms if row.paper is not None}
    papers = {"warmup=none": 1.10, "warmup=constant": 2.14, "scaling=fixed": 17.93, "scaling=sqrt": 2.48}
    assert found == papers | {"base_lr=0.1": 0.53, "base_lr=0.4": 0.31, "zero_gamma=false": 0.37}


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
    assert (states(findings.sizes), row.state) == ({"32": "reference", "128": "no verdict"}, "no verdict")
    assert math.isnan(row.cost)


def test_the_margin_moves_the_verdict(study: Study):
    assert states(findings_of(study, 0.5).sizes)["512"] == "within"
    assert states(findings_of(study, 0.05).sizes)["512"] != "within"
    for arguments, message in (((0.0, 1), "margin"), ((0.5, 0), "looks")):
        with pytest.raises(ValueError, match=message):
            findings_of(Study(None, ()), *arguments)


def test_others_runs_have_verdicts_without_a_recipe(tmp_path: Path):
    paths = [
        studies.write_csv(tmp_path / f"{size}-{seed}.csv", [50, 10 + seed / 10], minibatch=size, seed=seed)
        for size in (256, 512)
        for seed in range(5)
    ]
    findings = findings_of(read_paths(paths))
    assert states(findings.sizes) == {"256": "reference", "512": "within"}
    assert findings.sizes[0].recipe is None


def test_a_study_without_a_minibatch_has_no_rows():
    findings = findings_of(Study(None, ()))
    assert (findings.sizes, findings.arms, findings.reference, findings.first_failure) == ((), (), None, None)


def test_an_unfinished_runs_half_is_no_part_of_the_mean_curve(tmp_path: Path):
    studies.write_sweep(tmp_path, seeds=3, minibatches=(32,), arms=(), unfinished=["32-s2"])
    entry = read_study([tmp_path]).flat[0]
    curve = curve_of(entry)
    assert len(curve) == 24
    last = [result.curve[-1].error for result in entry.results[:2]]
    assert curve[-1] == (24, pytest.approx(sum(last) / 2))

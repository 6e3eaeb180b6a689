"""The verdict in sentences, for each way in which a study can end."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from onehour.study.others import read_paths
from onehour.study.results import Entry, Result, Study, read_study
from onehour.study.tables import Findings, findings_of
from onehour.study.wording import break_caption, headline, non_finite_notes

studies = importlib.import_module("studies")


def sweep(folder: Path, **options: Any) -> Findings:
    studies.write_sweep(folder, **({"arms": ()} | options))
    return findings_of(read_study([folder]))


def entry(size: int, *errors: float) -> Entry:
    results = tuple(Result(f"{size}-{seed}", (), size, seed, "finished", error) for seed, error in enumerate(errors))
    return Entry((), size, results)


def texts(findings: Findings) -> list[str]:
    return [sentence.text for sentence in headline(findings)]


def test_what_holds_and_where_it_breaks(tmp_path: Path):
    findings = sweep(tmp_path)
    assert texts(findings) == [
        "The recipe holds to minibatch 512 (16×): its error stays within 0.5 points of minibatch 32’s 3.60 ± 0.15 %"
        " (5 seeds).",
        "At 1k (32×) it is 8.40 points worse (p = 0.004) than the reference. Tests stop there: 2k has no verdict.",
    ]
    assert [sentence.state for sentence in headline(findings)] == ["holds", "worse"]
    assert break_caption(findings) == (
        "Minibatch 32 has 3.60 % error, and up to 512 (16×) it stays within 0.5 points of that; at 1k (32×) it is"
        " 12.00 %, +8.40 points; the paper’s recipe holds to 8k and is worse at 16k."
    )


def test_all_of_it_holds(tmp_path: Path):
    (text,) = texts(sweep(tmp_path, minibatches=(32, 64, 512)))
    assert text.startswith("The recipe holds to minibatch 512 (16×), the largest tried: its error stays within 0.5")


def test_nothing_holds(tmp_path: Path):
    (text,) = texts(sweep(tmp_path, minibatches=(32, 1024)))
    assert text == "At 1k (32×) it is 8.40 points worse (p = 0.004) than minibatch 32’s 3.60 ± 0.15 % (5 seeds)."


def test_undecided_says_how_many_seeds_would_decide(tmp_path: Path):
    study = Study(studies.BASE, (entry(32, 3.0, 3.4, 3.8, 3.2, 3.6), entry(64, 3.9, 3.1, 3.5, 4.1, 3.4)))
    findings = findings_of(study)
    verdict = findings.sizes[1].verdict
    assert verdict is not None
    assert verdict.state == "undecided"
    (sentence,) = headline(findings)
    assert sentence.text.startswith("At 64 (2×) it is undecided: +0.20 points, perhaps up to +0.")
    assert f"about {verdict.more_seeds} more seeds would decide it." in sentence.text
    assert sentence.seeds == 5 + (verdict.more_seeds or 0)


def test_too_few_seeds_to_call_anything_worse():
    findings = findings_of(Study(studies.BASE, (entry(32, 3.0, 3.1, 3.2), entry(64, 8.0, 8.1, 8.2))))
    assert "(3 seeds cannot show worse.)" in texts(findings)[0]


def test_one_seed_has_no_standard_deviation(tmp_path: Path):
    findings = sweep(tmp_path, seeds=1, minibatches=(32, 64, 512))
    (sentence,) = headline(findings)
    assert sentence.text == "At 64 (2×) there is no verdict: one seed has no standard deviation."
    assert sentence.seeds == 5
    assert "±" not in break_caption(findings)


def test_one_seed_at_the_reference():
    findings = findings_of(Study(studies.BASE, (entry(32, 3.0), entry(64, 8.0, 8.1, 8.2))))
    assert texts(findings) == ["At 64 (2×) there is no verdict: the reference has one seed, so no deviation."]


def test_one_minibatch_has_nothing_to_be_held_against(tmp_path: Path):
    assert texts(sweep(tmp_path, minibatches=(32,))) == [
        "There is one minibatch, 32, and nothing to hold it against: 3.60 ± 0.15 % error (5 seeds)."
    ]


def test_a_minibatch_without_a_finished_run_ends_the_sequence(tmp_path: Path):
    open_runs = [f"64-s{seed}" for seed in range(5)]
    findings = sweep(tmp_path, minibatches=(32, 64, 512), unfinished=open_runs)
    assert texts(findings)[0].startswith("At 64 (2×) no run has ended yet, so there is no verdict.")
    assert "at 64" not in break_caption(findings)


def test_a_reference_that_is_itself_too_large():
    study = Study(
        studies.BASE.replace(base_minibatch=64),
        (entry(32, 3.0, 3.1, 3.2, 3.05, 3.15), entry(64, 3.0, 3.1, 3.2, 3.05, 3.15), entry(128, 3, 3.1, 3.2, 3.1, 3)),
    )
    assert len(texts(findings_of(study))) == 1
    worse = Study(study.recipe, (entry(32, 5.0, 5.1, 5.2, 5.05, 5.15), *study.entries[1:]))
    assert texts(findings_of(worse))[1].startswith("Below it, 32 (0.5×) is worse: 2.00 points")


def test_curves_without_a_minibatch_have_no_verdict(tmp_path: Path):
    findings = findings_of(read_paths([studies.write_csv(tmp_path / "a.csv", [9, 8])]))
    assert "no minibatch to judge" in texts(findings)[0]


def test_runs_that_left_the_finite_numbers_are_named(tmp_path: Path):
    findings = sweep(tmp_path)
    assert non_finite_notes(findings.sizes) == (
        "2 of 5 runs of minibatch 2k left the finite numbers; each counts as chance, 90.0 %, and has a cross.",
    )


@pytest.mark.parametrize("margin", [0.25, 1.0])
def test_the_margin_is_said(tmp_path: Path, margin: float):
    studies.write_sweep(tmp_path, arms=(), minibatches=(32, 64))
    assert f"within {margin:g} points" in texts(findings_of(read_study([tmp_path]), margin))[0]

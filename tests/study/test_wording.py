"""Numbers as a report writes them, and the verdict in sentences for each way in which a study can end."""

import math
from pathlib import Path
from typing import Any

import pytest
import studies

from onehour.study.findings import Findings, Row, findings_of
from onehour.study.results import Entry, Result, Study, read_paths, read_study
from onehour.study.verdict import Verdict
from onehour.study.wording import (
    break_caption,
    error_text,
    headline,
    joined,
    non_finite_notes,
    number,
    points,
    printable,
    seconds_text,
    short,
    size_label,
    verdict_words,
)

NAN = math.nan
FEW = (3.0, 3.1, 3.2, 3.05, 3.15)


def sweep(folder: Path, **options: Any) -> Findings:
    studies.write_sweep(folder, arms=(), **options)
    return findings_of(read_study([folder]))


def entry(size: int, *errors: float) -> Entry:
    results = tuple(Result(f"{size}-{seed}", (), size, seed, "finished", error) for seed, error in enumerate(errors))
    return Entry((), size, results)


def texts(findings: Findings) -> list[str]:
    return [sentence.text for sentence in headline(findings)]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ([size_label(size) for size in (512, 8192, 1536, 1000)], ["512", "8k", "1.5k", "1000"]),
        ([number(-0.126), number(3.6), number(NAN)], ["−0.13", "3.60", "–"]),
        ([points(0.4), points(-0.4), points(-0.001), points(NAN)], ["+0.40", "−0.40", "0.00", "–"]),
        ([error_text(23.6, 0.12), error_text(23.6, NAN)], ["23.60 ± 0.12", "23.60"]),
        ([seconds_text(s) for s in (12.34, 600, 7200, NAN)], ["12.3 s", "10.0 min", "2.0 h", "–"]),
        ([joined(["a"]), joined(["a", "b", "c"])], ["a", "a, b and c"]),
        ([printable("a\x9b1m\nγ"), short("a\nb\x00" + 60 * "c", most=8)], ["a\\u009b1m\nγ", "a b ccc…"]),
    ],
)
def test_numbers_and_names(written: list[str], expected: list[str]):
    assert written == expected


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (None, ("reference", "")),
        (Verdict("holds", 0.1, upper=0.31), ("holds", "at most +0.31")),
        (Verdict("holds", 0.1, p_holds=0.0241, family=3), ("holds", "p = 0.024")),
        (Verdict("worse", 8.4, p=0.004), ("worse", "p = 0.004")),
        (Verdict("undecided", 0.4, more_seeds=1), ("undecided", "1 more seed")),
        (Verdict("undecided", 0.4), ("undecided", "over 100 more seeds")),
        (Verdict("untested", 9.0), ("not tested", "")),
        (Verdict("one seed", 0.4), ("no verdict", "")),
    ],
)
def test_a_verdict_in_a_cell(verdict: Verdict | None, words: tuple[str, str]):
    assert verdict_words(Row(entry(64, 3.0), "64", verdict=verdict)) == words
    assert verdict_words(Row(entry(64), "64", verdict=verdict)) == ("no run", "")


def test_what_holds_and_where_it_breaks(findings: Findings):
    assert texts(findings) == [
        "The recipe holds to minibatch 512 (16×): its error stays within 0.5 points of minibatch 32’s 3.60 ± 0.15 %"
        " (5 seeds).",
        "At 1k (32×) it is 8.40 points worse (p = 0.004) than the reference. Testing stops there: 2k has no verdict.",
    ]
    assert [sentence.state for sentence in headline(findings)] == ["holds", "worse"]
    assert break_caption(findings) == (
        "Minibatch 32 has 3.60 % error, and up to 512 (16×) it stays within 0.5 points of that; at 1k (32×) it is"
        " 12.00 %, +8.40 points; the paper’s recipe holds to 8k and is worse at 16k."
    )
    assert non_finite_notes(findings.sizes) == (
        "2 of 5 runs of minibatch 2k diverged (NaN or infinity); each counts as chance, 90.0 %, and is marked with"
        " a cross.",
    )


def test_all_of_it_holds(tmp_path: Path):
    (text,) = texts(sweep(tmp_path, minibatches=(32, 64, 512)))
    assert text.startswith("The recipe holds to minibatch 512 (16×), the largest tried: its error stays within 0.5")


def test_nothing_holds(tmp_path: Path):
    (text,) = texts(sweep(tmp_path, minibatches=(32, 1024)))
    assert text == "At 1k (32×) it is 8.40 points worse (p = 0.004) than minibatch 32’s 3.60 ± 0.15 % (5 seeds)."


def test_undecided_says_how_many_seeds_would_decide():
    study = Study(studies.BASE, (entry(32, 3.0, 3.4, 3.8, 3.2, 3.6), entry(64, 3.9, 3.1, 3.5, 4.1, 3.4)))
    findings = findings_of(study)
    verdict = findings.sizes[1].verdict
    assert verdict is not None
    assert verdict.state == "undecided"
    (sentence,) = headline(findings)
    assert sentence.text.startswith("At 64 (2×) it is undecided: +0.20 points, perhaps up to +0.")
    assert f"about {verdict.more_seeds} more seeds would decide it." in sentence.text
    assert sentence.seeds == 5 + (verdict.more_seeds or 0)


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ((entry(32, 3.0, 3.1, 3.2), entry(64, 8.0, 8.1, 8.2)), "(3 seeds cannot show worse.)"),
        ((entry(32, 3.0), entry(64, 3.0)), "At 64 (2×) there is no verdict: one seed has no standard deviation."),
        ((entry(32, 3.0), entry(64, 8.0, 8.1)), "no verdict: the reference, of one seed, has no standard deviation."),
        ((entry(32, *FEW),), "one minibatch, 32, and nothing to compare it with: 3.10 ± 0.08 % error (5 seeds)."),
    ],
)
def test_too_few_seeds_or_minibatches(entries: tuple[Entry, ...], text: str):
    (sentence,) = headline(findings_of(Study(studies.BASE, entries)))
    assert text in sentence.text
    assert sentence.seeds == (0 if len(entries) == 1 else 4 if "cannot" in text else 5)


def test_a_minibatch_without_a_finished_run_ends_the_sequence(tmp_path: Path):
    findings = sweep(tmp_path, seeds=2, minibatches=(32, 64, 512), unfinished=["64-s0", "64-s1"])
    assert texts(findings)[0].startswith("At 64 (2×) no run has ended yet, so there is no verdict.")
    assert "at 64" not in break_caption(findings)


def test_a_reference_that_is_itself_too_large():
    recipe = studies.BASE.replace(base_minibatch=64)
    rest = (entry(64, *FEW), entry(128, *FEW))
    assert len(texts(findings_of(Study(recipe, (entry(32, *FEW), *rest))))) == 1
    worse = Study(recipe, (entry(32, 5.0, 5.1, 5.2, 5.05, 5.15), *rest))
    assert texts(findings_of(worse))[1].startswith("Below it, 32 (0.5×) is worse: 2.00 points")


def test_curves_without_a_minibatch_have_no_verdict(tmp_path: Path):
    findings = findings_of(read_paths([studies.write_csv(tmp_path / "a.csv", [9, 8])]))
    assert "no minibatch to judge" in texts(findings)[0]


@pytest.mark.parametrize("margin", [0.25, 1.0])
def test_the_margin_is_said(study: Study, margin: float):
    assert f"within {margin:g} points" in texts(findings_of(study, margin))[0]

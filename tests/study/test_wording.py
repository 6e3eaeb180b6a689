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
    printable,
    seconds_text,
    short,
    size_label,
    verdict_words,
)

NAN = math.nan
MINUTES = ["1 min 30 s", "10 min", "59 min 29 s"]
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
        ([error_text(23.6, 0.12), error_text(23.6, NAN)], ["23.60 ± 0.12", "23.60"]),
        ([seconds_text(s) for s in (0.25, 12.34, 59.4, 59.6)], ["0.25 s", "12.3 s", "59.4 s", "1 min"]),
        ([seconds_text(s) for s in (90, 600, 3569, 3571, 7530, NAN)], [*MINUTES, "1 h", "2 h 6 min", "–"]),
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
        (Verdict("within", 0.1), ("within", "")),
        (Verdict("beyond", 8.4), ("beyond", "")),
        (Verdict("above", 0.4, more_seeds=1), ("above", "1 more seed")),
        (Verdict("undecided", 0.4), ("undecided", "over 100 more seeds")),
        (Verdict("broke", 9.0, broke=1), ("broke", "")),
        (Verdict("no verdict", 0.4), ("no verdict", "")),
    ],
)
def test_a_verdict_in_a_cell(verdict: Verdict | None, words: tuple[str, str]):
    assert verdict_words(Row(entry(64, 3.0), "64", verdict=verdict)) == words
    assert verdict_words(Row(entry(64), "64", verdict=verdict)) == ("no run", "")


def test_the_first_sentence_says_what_to_do_and_the_second_where_it_breaks(findings: Findings):
    assert texts(findings) == [
        "Train at minibatch 512 (16×) or below: up to there the error stays within 0.5 points of minibatch 32’s"
        " 3.60 ± 0.15 % (5 seeds), and a run takes 14.5 s in place of 52 s. None of the 5 runs there broke; up to 45 %"
        " may (95 % confidence).",
        "At 1k (32×) 5 of 5 runs broke (55 to 100 % do): they diverged, or ended more than 5 points above the"
        " reference’s median.",
    ]
    assert [sentence.state for sentence in headline(findings)] == ["within", "broke"]
    text = (
        "Minibatch 32 has 3.60 % error, and up to 512 (16×) it stays within 0.5 points of that; at 1k (32×) it is"
        " 12.00 %, +8.40 points, and 5 of 5 runs broke"
    )
    assert break_caption(findings) == f"{text}."
    papers = "; the paper’s recipe holds to 8k and is beyond the margin at 16k."
    assert break_caption(findings, papers=True) == text + papers
    assert non_finite_notes(findings.sizes) == (
        "2 of 5 runs of minibatch 2k diverged (NaN or infinity); each counts as chance, 90.0 %, and is marked with"
        " a cross.",
    )


def test_all_of_it_holds(tmp_path: Path):
    (text,) = texts(sweep(tmp_path, minibatches=(32, 64, 512)))
    assert text.startswith(
        "Train at minibatch 512 (16×), the largest tried, or below: up to there the error stays within"
    )


@pytest.mark.parametrize(
    ("errors", "text", "state", "seeds"),
    [
        (
            (5.0, 5.1, 5.2, 5.05, 5.15),
            "at 64 (2×) the error lies +2.00 [+1.91, +2.09] points above it, beyond",
            "beyond",
            0,
        ),
        ((3.0, 3.1, 3.2, 3.05, 13.15), "at 64 (2×) 1 of 5 runs broke (1 to 66 % do): they diverged, or", "broke", 0),
        (
            (3.5, 3.6, 3.7, 3.5, 3.8),
            "at 64 (2×) it is above, margin open: +0.52 [+0.39, +0.65] points; not",
            "above",
            0,
        ),
        ((3.0, 4.1, 3.2, 3.05, 3.9), "at 64 (2×) it is undecided: +0.35 [−0.14, +0.84] points; about", "undecided", 35),
        ((3.0,), "at 64 (2×) there is no verdict: one seed has no std; train at least 2.", "no verdict", 5),
        ((), "at 64 (2×) there is no verdict: no run has ended.", "no verdict", 0),
    ],
)
def test_where_nothing_holds_the_advice_is_to_stay(errors: tuple[float, ...], text: str, state: str, seeds: int):
    findings = findings_of(Study(studies.BASE, (entry(32, *FEW), entry(64, *errors))))
    (sentence,) = headline(findings)
    assert sentence.text.startswith(f"Stay at minibatch 32, 3.10 ± 0.08 % (5 seeds): {text}")
    assert sentence.state == state
    verdict = findings.sizes[1].verdict
    assert verdict is not None
    assert sentence.seeds == (5 + verdict.more_seeds if verdict.more_seeds else seeds)


def test_looking_again_is_warned_of_unless_it_is_planned():
    study = Study(studies.BASE, (entry(32, *FEW), entry(64, 3.0, 4.1, 3.2, 3.05, 3.9)))
    once, twice = (headline(findings_of(study, looks=looks))[0].text for looks in (1, 2))
    assert once.endswith("Looking again makes a false “within” likelier; --looks 2 from the start keeps it at 5 %.")
    assert twice.endswith("would decide it, if means and std stayed.")


@pytest.mark.parametrize(
    ("entries", "text"),
    [
        ((entry(32, 3.0), entry(64, 5.0, 5.1)), "there is no verdict: one seed at the reference has no std; train at"),
        ((entry(32, *FEW),), "Train another minibatch too: minibatch 32 alone, 3.10 ± 0.08 % (5 seeds), has nothing"),
        ((entry(32, *FEW, 50.0), entry(64, *FEW)), "Fix the reference first: at minibatch 32 1 of 6 runs broke"),
    ],
)
def test_what_cannot_be_compared(entries: tuple[Entry, ...], text: str):
    (sentence,) = headline(findings_of(Study(studies.BASE, entries)))
    assert text in sentence.text


def test_a_minibatch_without_a_finished_run_ends_the_sequence(tmp_path: Path):
    findings = sweep(tmp_path, seeds=2, minibatches=(32, 64, 512), unfinished=["64-s0", "64-s1"])
    assert "at 64 (2×) there is no verdict: no run has ended." in texts(findings)[0]
    assert "at 64" not in break_caption(findings)


def test_a_reference_that_is_itself_too_large():
    recipe = studies.BASE.replace(base_minibatch=64)
    rest = (entry(64, *FEW), entry(128, *FEW))
    assert len(texts(findings_of(Study(recipe, (entry(32, *FEW), *rest))))) == 1
    worse = Study(recipe, (entry(32, 5.0, 5.1, 5.2, 5.05, 5.15), *rest))
    assert texts(findings_of(worse))[1].startswith("Below it, 32 (0.5×): beyond the margin: +2.00 [")


def test_curves_without_a_minibatch_have_no_verdict(tmp_path: Path):
    findings = findings_of(read_paths([studies.write_csv(tmp_path / "a.csv", [9, 8])]))
    assert texts(findings)[0].startswith("Name each curve’s minibatch (a column minibatch)")


@pytest.mark.parametrize("margin", [0.25, 1.0])
def test_the_margin_is_said(study: Study, margin: float):
    assert f"within {margin:g} points" in texts(findings_of(study, margin))[0]

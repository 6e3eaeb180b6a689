"""What is listed of a case: findings without their symptoms, and a line for what was not judged."""

from typing import Any

import pytest

from onehour.check.case import Base, Case
from onehour.check.pitfalls import PITFALLS, Note, judge, not_judged
from onehour.check.run import checking
from onehour.check.run.checking import Checked
from onehour.check.story import Story
from onehour.check.tape import BackwardPass, InitialWeights, LossTerm, OptimizerStep, Tape, WeightsUpdated
from onehour.cli import main


def process(weight: float, *, after: float, gradient: float) -> Story:
    tape = Tape()
    tape.add(InitialWeights(values=[weight]))
    values: dict[str, Any] = {"before": {"w": [weight]}, "after": {"w": [after]}, "gradients": {"w": [gradient]}}
    tape.add(WeightsUpdated("train.py:9", **values))
    return Story(tape)


def test_symptoms_are_not_listed_beside_what_they_come_from():
    apart = [process(1.0, after=0.9, gradient=1.0), process(2.0, after=1.5, gradient=5.0)]
    assert [finding.pitfall for finding in judge(Case(apart))] == ["gradients-not-averaged"]
    assert judge(Case(apart), only=["different-initial-weights"]) == []
    assert judge(Case(apart), skip=["gradients-not-averaged"]) == []
    averaged = [process(1.0, after=0.9, gradient=1.0), process(2.0, after=1.9, gradient=1.0)]
    assert [finding.pitfall for finding in judge(Case(averaged))] == ["different-initial-weights"]


def test_symptoms_are_ids():
    assert all({*pitfall.symptoms} <= PITFALLS.keys() - {pitfall.id} for pitfall in PITFALLS.values())
    notes = not_judged(Case([process(1.0, after=0.9, gradient=1.0)]), ["no-warmup"])
    assert all({*note.pitfalls} <= PITFALLS.keys() for note in notes)


def loop(*optimizers: int, contents: list[float] | None = None, **term: Any) -> Case:
    tape = Tape()
    for update in range(12):
        content = [contents[update % len(contents)]] if contents else None
        terms = [LossTerm("mse_loss", "train.py:3", **{"count": 8, "total": 1.0, "low": 0.125, "high": 0.125} | term)]
        tape.add(BackwardPass("train.py:4", terms=terms, samples=8, content=content))
        tape.add(OptimizerStep("train.py:5", optimizer=optimizers[update % len(optimizers)], rates=[0.1]))
    return Case([Story(tape)])


def said(case: Case, asked: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    return {note.partition(":")[0]: note.pitfalls for note in not_judged(case, asked)}


def test_why_something_was_not_judged():
    notes = said(loop(0))
    assert list(notes) == ["no DataLoader gives the training data"]
    assert "same-order-every-epoch" in notes["no DataLoader gives the training data"]
    assert "accumulation-tail" in said(loop(0, 1))["several optimizers step"]
    assert "rates were not judged" in said(loop(0), ("no-warmup",))
    assert "rates were not judged" not in said(loop(0), ("double-step",))


def test_inputs_that_come_again_without_a_loader_are_judged():
    (finding,) = judge(loop(0, contents=[1.0, 2.0, 3.0, 4.0]))
    assert finding.pitfall == "same-order-every-epoch"
    assert finding.measured == "epochs 0 and 1 take their 4 batches in one order (without a DataLoader)"
    assert said(loop(0, contents=[1.0, 2.0, 3.0, 4.0])) == {}
    assert judge(loop(0, contents=[1.0])) == []  # one batch of all samples
    assert judge(loop(0, contents=[float(i) for i in range(8)])) == []  # no second epoch was seen
    assert judge(loop(0, contents=[1.0, 2.0, 3.0, 1.0, 3.0, 2.0])) == []


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 0),
        (["--only", "same-order-every-epoch"], 3),
        (["--only", "double-step"], 0),
        (["--strict"], 3),
        (["--strict", "--skip", "same-order-every-epoch"], 0),
    ],
)
def test_the_exit_code_where_something_was_not_judged(
    options: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    checked = Checked([], notes=[Note("1 whole epoch was seen", "same-order-every-epoch")])
    monkeypatch.setattr(checking, "check_script", lambda *arguments, **options: checked)
    assert main(["check", "train.py", *options]) == code
    assert "note: 1 whole epoch was seen" in capsys.readouterr().out


def test_a_base_is_enough_for_rates():
    case = Case(loop(0).stories, Base(0.1, 8))
    assert "rates were not judged" not in said(case, ("no-warmup",))

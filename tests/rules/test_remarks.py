"""What is said of a schedule: what never comes into effect, and a warmup that does not end where it seems to."""

from typing import Any

import pytest

from onehour import Recipe
from onehour.cli import main

QUIET: list[dict[str, Any]] = [
    {},
    {"minibatch": 8192},
    {"minibatch": 8192, "decay": "cosine"},
    {"minibatch": 8192, "warmup": "constant"},
    {"minibatch": 256, "milestones": ("3", "30")},  # no warmup, since the rate does not grow
    {"minibatch": 512, "warmup": "none", "milestones": ("3", "30")},
    {"minibatch": 512, "milestones": ("5.001",), "epochs": 6},
    {"minibatch": 512, "epochs": 6, "decay": "cosine", "warmup_epochs": 1},
    {"minibatch": 512, "scaling": "fixed", "warmup_epochs": 90},
    {"decay": "cosine", "epochs": 5, "warmup_epochs": 5, "milestones": ("30",)},
]


@pytest.mark.parametrize("changes", QUIET)
def test_nothing_is_said_of_a_schedule_that_does_what_it_says(changes: dict[str, Any]):
    assert Recipe(**changes).remarks == []
    assert Recipe(samples=1_281_167, **changes).remarks == []


SAID: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 60}, "milestones 60, 80 are not before the end of the run of 60 epochs"),
    ({"epochs": 61, "milestones": ("30", "60", "61")}, "milestone 61 is not before the end of the run of 61 epochs"),
    (
        {"minibatch": 8192, "milestones": ("3", "30")},
        "milestone 3 is not behind the warmup of 5 epochs, which thus ends",
    ),
    ({"minibatch": 8192, "milestones": ("5",)}, "not behind the warmup of 5 epochs, which thus ends at 0.32: the rate"),
    ({"minibatch": 8192, "milestones": ("5",), "warmup": "constant"}, "the rate never stands at 3.2"),
    ({"minibatch": 8192, "epochs": 7, "decay": "cosine"}, "the decay has begun in the warmup of 5 epochs"),
    ({"minibatch": 512, "epochs": 5, "milestones": ()}, "the warmup of 5 epochs is the whole run"),
    # Iterations begin at epochs 0, 0.5, …, 29.5; this one is behind the last of them.
    (
        {"samples": 512, "epochs": 30, "milestones": ("29.6",)},
        "milestone 148/5 is behind the last iteration, which beg",
    ),
]


@pytest.mark.parametrize(("changes", "said"), SAID)
def test_what_never_comes_into_effect_is_said_once(changes: dict[str, Any], said: str):
    (remark,) = Recipe(**changes).remarks
    assert said in remark
    assert "\n" not in remark


@pytest.mark.parametrize(
    "changes", [{"decay": "cosine", "epochs": 6}, {"milestones": ("2",)}, {"milestones": ("5",), "warmup": "constant"}]
)
def test_a_warmup_that_falls_is_said(changes: dict[str, Any]):
    recipe = Recipe(minibatch=512, **changes)
    assert recipe.schedule(recipe.warmup_epochs) < recipe.schedule(0)
    assert len(recipe.remarks) == 2
    assert recipe.remarks[-1].startswith("the rate falls in the warmup, from 0.1 to ")


def test_a_remark_is_true_of_the_rates_of_a_run():
    """Of the first case: no iteration has another rate than without those milestones."""
    whole, cut = (Recipe(samples=1024, epochs=60, milestones=m) for m in (("30", "60", "80"), ("30",)))
    rates = [[r.schedule(t * 256 / 1024) for t in range(r.workers.iterations(1024, 60))] for r in (whole, cut)]
    assert rates[0] == rates[1]
    assert whole.remarks
    assert not cut.remarks


@pytest.mark.parametrize("flags", [[], ["--json"], ["--minibatch", "256,512"], ["--as", "torch"]])
def test_a_plan_says_it_beside_what_it_prints(flags: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "resnet50", "--epochs", "70", "--milestones", "30,60,80", *flags]) == 0
    printed = capsys.readouterr()
    note = "note: milestone 80 is not before the end of the run of 70 epochs: the rate never drops there\n"
    assert printed.err == note
    assert "milestone 80" not in printed.out

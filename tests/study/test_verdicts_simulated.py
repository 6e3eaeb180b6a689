"""How often verdicts are wrong: 2,000 simulated sweeps of benchmarks/verdicts.py, which says what the study says."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from onehour.study.verdict import Sample, holm, judge_arms, judge_minibatches, p_holds, p_worse

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMITTED: dict[str, Any] = json.loads((BENCHMARKS / "results" / "verdicts.json").read_text(encoding="utf-8"))
SWEEPS = 2000
DIFFERENCES = (0.0, 0.1, 0.25, 0.5, 0.9)


@pytest.fixture(scope="module")
def simulation() -> Iterator[Any]:
    """benchmarks/verdicts.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        module = importlib.import_module("verdicts")
        patch.setattr(module, "LONG", 1)
        yield module


def same(ours: list[float], theirs: np.ndarray) -> bool:
    return bool(np.allclose(ours, theirs, rtol=1e-9, atol=1e-12))


@pytest.mark.parametrize("stds", [(0.2, 0.2), (0.12, 0.3)])
@pytest.mark.parametrize(("seeds", "step"), [(5, 0.0), (5, 100 / 4096), (5, 0.1), (2, 0.1), (3, 0.0), (10, 0.0)])
def test_the_simulation_says_what_the_study_says(simulation: Any, stds: tuple[float, float], seeds: int, step: float):
    errors = simulation.draw(np.random.default_rng(7), 100, DIFFERENCES, seeds, stds, step)
    minibatches, arms = simulation.states_of_minibatches(errors), simulation.states_of_arms(errors)
    holds, worse = simulation.p_holds(errors), simulation.p_worse(errors)
    for place, sweep in enumerate(errors.tolist()):
        reference, *entries = map(Sample.of, sweep)
        found = judge_minibatches(0, dict(enumerate([reference, *entries])))
        assert [verdict.state for verdict in found.values()] == minibatches[place].tolist()
        assert [verdict.state for verdict in judge_arms([(e, reference) for e in entries])] == arms[place].tolist()
        assert same([p_holds(entry, reference, 0.5) for entry in entries], holds[place])
        assert same([p_worse(entry, reference) for entry in entries], worse[place])
        assert same(holm(worse[place].tolist()), simulation.holm(worse[place]))


def test_the_states_that_are_compared_do_occur(simulation: Any):
    errors = simulation.draw(np.random.default_rng(7), 100, DIFFERENCES, 5)
    assert set(simulation.states_of_minibatches(errors).ravel()) == {"holds", "worse", "undecided", "untested"}
    assert set(simulation.states_of_arms(errors).ravel()) == {"holds", "worse", "undecided"}
    tied = simulation.draw(np.random.default_rng(7), 100, DIFFERENCES, 5, step=0.1)
    assert len(np.unique(tied)) < 40


def not_above(rows: list[dict[str, Any]], level: float = 0.05) -> bool:
    """Whether chances of at most `level` give such shares: 95 % intervals, for all rows together (Bonferroni)."""
    ends = [
        stats.binomtest(round(row["share"] * row["n"]), row["n"])
        .proportion_ci(1 - 0.05 / len(rows), method="exact")
        .low
        for row in rows
    ]
    return max(ends) <= level


@pytest.mark.parametrize("scenario", ["false_holds", "families"])
def test_false_verdicts_come_in_at_most_one_sweep_in_twenty(simulation: Any, scenario: str):
    """With other random numbers than the committed ones."""
    rows = getattr(simulation, scenario)(np.random.default_rng(11), SWEEPS)
    assert {row["n"] for row in rows} == {SWEEPS}
    assert not_above(rows)
    assert sum(row["share"] for row in rows) / len(rows) < 0.0525


def test_tests_that_let_too_much_pass_would_be_noticed(simulation: Any):
    errors = simulation.draw(np.random.default_rng(3), SWEEPS, [0.5], 5)
    too_kind = simulation.share(simulation.p_holds(errors)[:, 0] < 0.1)
    assert not not_above([too_kind] * 50)


@pytest.mark.parametrize(("seeds", "about"), [(5, 0.55), (10, 0.85)])
def test_power_at_half_the_margin_and_a_std_of_a_fifth(simulation: Any, seeds: int, about: float):
    errors = simulation.draw(np.random.default_rng(5), SWEEPS, [0.25], seeds, (0.2, 0.2))
    row = simulation.share(simulation.p_holds(errors)[:, 0] < 0.05)
    assert row["low"] - 0.01 < about < row["high"] + 0.01


def test_the_committed_sweeps_are_as_many_as_claimed_and_within():
    assert COMMITTED["sweeps"] >= SWEEPS
    assert COMMITTED["margin"] == 0.5
    assert {(row["reference_std"], row["std"]) for row in COMMITTED["false_holds"]} >= {(0.2, 0.2), (0.12, 0.3)}
    assert {row["step"] for row in COMMITTED["false_holds"]} == {0.0, 100 / 4096, 0.1}
    assert {row["family"] for row in COMMITTED["families"]} == {"minibatches", "arms"}
    for rows in (COMMITTED["false_holds"], COMMITTED["families"]):
        assert {row["n"] for row in rows} == {COMMITTED["sweeps"]}
        assert not_above(rows)
    assert max(row["long_run"] for row in COMMITTED["false_holds"]) < 0.0525

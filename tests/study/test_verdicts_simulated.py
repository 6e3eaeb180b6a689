"""How often verdicts are wrong: simulated sweeps of benchmarks/verdicts.py, which says what the study says."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from onehour.study.verdict import Sample, judge

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMITTED: dict[str, Any] = json.loads((BENCHMARKS / "results" / "verdicts.json").read_text(encoding="utf-8"))
SWEEPS = 2000


@pytest.fixture(scope="module")
def simulation() -> Iterator[Any]:
    """benchmarks/verdicts.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("verdicts")


@pytest.mark.parametrize("law", ["normal", "heavy-tailed", "skewed"])
@pytest.mark.parametrize("seeds", [(5, 5), (5, 10), (2, 4)])
def test_the_simulation_says_what_the_study_says(simulation: Any, law: str, seeds: tuple[int, int]):
    generator = np.random.default_rng(7)
    seen: set[str] = set()
    for difference in (0.0, 0.3, 0.5, 1.2):
        errors, others = simulation.pairs_of(generator, 25, difference, seeds, (0.2, 0.3), law)
        for looks in (1, 2):
            found = simulation.states(simulation.welch(errors, others, looks))
            pairs = simulation.states(simulation.paired(errors, others[:, : seeds[0]]))
            for place, (a, b) in enumerate(zip(errors.tolist(), others.tolist(), strict=True)):
                arm, own = (Sample.of(side, range(len(side))) for side in (a, b))
                assert judge(arm, own, looks=looks).state == found[place]
                assert judge(arm, own, pair=True).state == pairs[place]
            seen |= set(found.tolist())
    assert seen == {"within", "above", "beyond", "undecided"}


def test_advice_in_the_simulation_is_the_studys(simulation: Any):
    errors, others = simulation.pairs_of(np.random.default_rng(3), 20, 0.4, (5, 10))
    for more in (1, 4, 30):
        found = simulation.states(simulation.welch(errors, others, 1, more))
        for place, (a, b) in enumerate(zip(errors.tolist(), others.tolist(), strict=True)):
            advised = judge(Sample.of(a), Sample.of(b)).more_seeds
            assert advised != more or found[place] in ("within", "beyond")


def not_above(rows: list[dict[str, Any]], level: float = 0.05) -> bool:
    """Whether chances of at most `level` give such shares: 95 % intervals, for all rows together (Bonferroni)."""
    ends = [
        stats.binomtest(round(row["share"] * row["n"]), row["n"])
        .proportion_ci(1 - 0.05 / len(rows), method="exact")
        .low
        for row in rows
    ]
    return max(ends) <= level


def falsely(rows: list[dict[str, Any]], *laws: str) -> list[dict[str, Any]]:
    return [row[state] for row in rows if row["law"] in laws for state in ("within", "beyond", "above")]


@pytest.mark.parametrize("law", ["normal", "heavy-tailed"])
def test_each_false_state_comes_in_at_most_one_of_twenty(simulation: Any, law: str):
    """With other random numbers than the committed ones; Welch's is an approximation, so a little is allowed."""
    rows = falsely(simulation.false_states(np.random.default_rng(11), SWEEPS), law)
    assert not_above(rows, 0.055)
    assert sum(row["share"] for row in rows) / len(rows) < 0.05


def test_tests_that_let_too_much_pass_would_be_noticed(simulation: Any):
    pairs = simulation.pairs_of(np.random.default_rng(3), SWEEPS, 0.5, (5, 10))
    _, _, upper = simulation.welch(*pairs, looks=1)
    too_kind = simulation.share(upper < 0.6)
    assert not not_above([too_kind] * 50, 0.055)


def test_the_committed_shares_are_what_the_documents_say():
    rows = COMMITTED["false_states"]
    assert COMMITTED["sweeps"] >= 20_000
    assert {row["interval"] for row in rows} == {"Welch's", "paired"}
    assert max(row["share"] for row in falsely(rows, "normal", "heavy-tailed")) < 0.057
    assert max(row["share"] for row in COMMITTED["claims"]) < 0.054
    for row in COMMITTED["looks"]:
        assert row["either"]["share"] < 0.05 if row["looks"] == 2 else row["either"]["share"] > 0.075
    power = {
        (row["seeds"], row["reference_seeds"]): row["within"]
        for row in COMMITTED["power"]
        if (row["law"], row["std"], row["difference"]) == ("normal", 0.2, 0.25)
    }
    assert power[5, 10] > power[5, 5] + 0.08  # twice the reference's seeds
    unseen = {row["seeds"]: row["within"]["share"] for row in COMMITTED["breaks"]}
    assert 0.5 < unseen[5] < 0.6

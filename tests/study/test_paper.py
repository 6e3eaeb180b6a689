"""The paper's tables: complete, consistent with each other and with the rules, and judged as the paper judges them."""

import pytest

from onehour.config import Recipe
from onehour.rules.minibatch import fixed_scaling, linear_scaling, sqrt_scaling
from onehour.study.paper import paper_cost, paper_table, paper_verdicts
from onehour.study.verdict import Sample, judge

TABLES = ("minibatches", "T1", "T2a", "T2b", "T2c", "T3a, box AP", "T3a, mask AP")
RULES = {"scaling=fixed": fixed_scaling, "scaling=sqrt": sqrt_scaling}
BASE_RATES = {"base_lr=0.05": 0.05, "base_lr=0.2": 0.2}


def test_the_tables_are_the_papers():
    table = paper_table()
    assert [row["minibatch"] for row in table] == [2**power for power in range(7, 17)]
    assert [row["mean"] for row in table] == [23.49, 23.60, 23.48, 23.53, 23.49, 23.56, 23.74, 24.79, 27.55, 33.96]
    assert [row["std"] for row in table] == [0.12, 0.12, 0.09, 0.08, 0.11, 0.12, 0.09, 0.27, 0.28, 0.80]
    errors = [(row["mean"], row["std"]) for row in paper_table("T1")]
    assert errors == [(23.60, 0.12), (24.84, 0.37), (25.88, 0.56), (23.74, 0.09)]
    assert [row["mean"] for row in paper_table("T2a")] == [23.92, 23.60, 23.68, 24.27, 23.74, 24.05, 41.67, 26.22]
    assert [row["std"] for row in paper_table("T2a")] == [0.10, 0.12, 0.09, 0.08, 0.09, 0.18, 0.10, 0.03]
    assert [row["mean"] for row in paper_table("T2b")] == [23.84, 23.60, 24.11, 23.74]
    assert [row["std"] for row in paper_table("T2b")] == [0.18, 0.12, 0.07, 0.09]
    assert [(row["mean"], row["std"]) for row in paper_table("T2c")] == [(22.08, 0.06), (22.36, 0.09)]
    assert [row["mean"] for row in paper_table("T3a, box AP")] == [35.9, 35.8, 35.9, 35.9, 35.8, 35.8, 35.1]
    assert [row["mean"] for row in paper_table("T3a, mask AP")] == [33.9, 33.8, 33.9, 33.9, 33.8, 33.9, 33.2]


@pytest.mark.parametrize("name", TABLES)
def test_every_rate_follows_from_its_rule(name: str):
    for row in paper_table(name):
        label = row.get("label", "")
        rule = RULES.get(label, linear_scaling)
        assert row["target_lr"] == pytest.approx(rule(BASE_RATES.get(label, 0.1), 256, row["minibatch"]))


@pytest.mark.parametrize("label", ["baseline", "warmup=gradual", "base_lr=0.1", "zero_gamma=true"])
def test_the_papers_recipe_has_one_error_in_every_table(label: str):
    flat = {row["minibatch"]: (row["mean"], row["std"]) for row in paper_table()}
    found = [row for name in TABLES for row in paper_table(name) if row.get("label") == label]
    assert found
    assert all((row["mean"], row["std"]) == flat[row["minibatch"]] for row in found)


STATES = {
    "minibatches": ["within", "reference", *["within"] * 5, "beyond", "beyond", "beyond"],
    "T1": ["reference", "beyond", "beyond", "within"],
    "T2a": ["within", "reference", "within", "above", "within", "within", "beyond", "beyond"],
    "T2b": ["within", "reference", "within", "within"],
    "T2c": ["reference", "within"],
    "T3a, box AP": ["reference", *["within"] * 5, "beyond"],
    "T3a, mask AP": ["reference", *["within"] * 5, "above"],
}


@pytest.mark.parametrize("name", TABLES)
def test_each_of_the_papers_entries_has_its_state(name: str):
    """In its own order: T1 none, constant, gradual; T2a three rates at 256 and at 8k, fixed, √k."""
    found = [verdict.state if verdict else "reference" for _, verdict in paper_verdicts(name)]
    assert found == STATES[name]


def test_an_entry_stands_beside_the_recipe_at_its_minibatch_and_that_beside_256():
    by_label = {row["label"]: verdict for row, verdict in paper_verdicts("T2a") if row["minibatch"] == 8192}
    own = Sample(23.74, 0.09, 5)
    assert by_label["base_lr=0.2"] == judge(Sample(24.05, 0.18, 5), own)
    assert by_label["base_lr=0.1"] == judge(own, Sample(23.60, 0.12, 5))
    lost = {row["minibatch"]: verdict for row, verdict in paper_verdicts("T3a, box AP")}[16384]
    assert lost is not None
    assert lost.difference == pytest.approx(35.9 - 35.1)
    assert lost.broke is None


def test_the_papers_cost_needs_the_papers_own_recipe():
    assert paper_cost((("warmup", "none"),), Recipe()) == pytest.approx(24.84 - 23.74)
    assert paper_cost((("base_lr", "0.05"),), Recipe()) == pytest.approx(24.27 - 23.74)
    assert paper_cost((("warmup", "constant"),), Recipe(warmup="none")) is None
    assert paper_cost((("warmup", "none"),), None) is None
    assert paper_cost((("warmup", "none"), ("momentum", "0.8")), Recipe()) is None
    assert paper_cost((("momentum", "0.8"),), Recipe()) is None

"""The paper's tables: complete, consistent with each other and with the rules, and judged as the paper judges them."""

import pytest

from onehour.config import Recipe
from onehour.rules.minibatch import fixed_scaling, linear_scaling, sqrt_scaling
from onehour.study.paper import SEEDS, paper_cost, paper_samples, paper_table
from onehour.study.verdict import Sample, judge_arms, judge_minibatches

TABLES = ("minibatches", "T1", "T2a", "T2b")
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
    assert [row["mean"] for row in paper_table("T2b")] == [23.84, 23.60, 24.11, 23.74]


@pytest.mark.parametrize("name", TABLES)
def test_every_rate_follows_from_its_rule(name: str):
    for row in paper_table(name):
        label = row.get("label", "")
        rule = RULES.get(label, linear_scaling)
        assert row["target_lr"] == pytest.approx(rule(BASE_RATES.get(label, 0.1), 256, row["minibatch"]))


@pytest.mark.parametrize("label", ["baseline", "warmup=gradual", "base_lr=0.1", "zero_gamma=true"])
def test_the_papers_recipe_has_one_error_in_every_table(label: str):
    flat = {row["minibatch"]: row["mean"] for row in paper_table()}
    found = [row for name in TABLES for row in paper_table(name) if row.get("label") == label]
    assert found
    assert all(row["mean"] == flat[row["minibatch"]] for row in found)


def test_the_paper_holds_to_8k_and_is_worse_at_16k():
    samples = paper_samples()
    assert samples[8192] == Sample(23.74, 0.09, 5)
    verdicts = judge_minibatches(256, samples)
    assert {size: verdict.state for size, verdict in verdicts.items()} == {
        **dict.fromkeys((128, 512, 1024, 2048, 4096, 8192), "holds"),
        16384: "worse",
        32768: "untested",
        65536: "untested",
    }
    assert verdicts[8192].text == "holds: at most 0.27 points above"
    assert verdicts[16384].text == "worse: 1.19 points, p < 0.001"
    assert verdicts[32768].text == "not tested: minibatch 16384 does not hold; 3.95 points above"


def test_the_papers_other_warmups_are_worse():
    rows = {row["label"]: Sample(row["mean"], row["std"], SEEDS) for row in paper_table("T1")}
    arms = [(rows[f"warmup={kind}"], rows["warmup=gradual"]) for kind in ("none", "constant")]
    verdicts = judge_arms(arms)
    assert [verdict.state for verdict in verdicts] == ["worse", "worse"]
    assert [round(verdict.difference, 2) for verdict in verdicts] == [1.10, 2.14]


def test_the_papers_cost_needs_the_papers_own_recipe():
    assert paper_cost((("warmup", "none"),), Recipe()) == pytest.approx(24.84 - 23.74)
    assert paper_cost((("base_lr", "0.05"),), Recipe()) == pytest.approx(24.27 - 23.74)
    assert paper_cost((("warmup", "constant"),), Recipe(warmup="none")) is None
    assert paper_cost((("warmup", "none"),), None) is None
    assert paper_cost((("warmup", "none"), ("momentum", "0.8")), Recipe()) is None
    assert paper_cost((("momentum", "0.8"),), Recipe()) is None

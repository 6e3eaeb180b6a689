"""The paper's tables: complete, consistent with each other and with the rules, and judged as the paper judges them."""

from typing import Literal

import pytest

from onehour.rules.minibatch import fixed_scaling, linear_scaling, sqrt_scaling
from onehour.study.paper import PaperEntry, paper_samples, paper_table
from onehour.study.statistics import Sample
from onehour.study.verdict import judge_arms, judge_minibatches, summary

TABLES: tuple[Literal["minibatches", "T1", "T2a", "T2b"], ...] = ("minibatches", "T1", "T2a", "T2b")
RULES = {"scaling=fixed": fixed_scaling, "scaling=sqrt": sqrt_scaling}
BASE_RATES = {"base_lr=0.05": 0.05, "base_lr=0.2": 0.2}


def test_the_table_over_minibatches():
    table = paper_table()
    assert [entry.minibatch for entry in table] == [2**power for power in range(7, 17)]
    assert [entry.mean for entry in table] == [23.49, 23.60, 23.48, 23.53, 23.49, 23.56, 23.74, 24.79, 27.55, 33.96]
    assert [entry.std for entry in table] == [0.12, 0.12, 0.09, 0.08, 0.11, 0.12, 0.09, 0.27, 0.28, 0.80]
    assert {entry.n for entry in table} == {5}


def test_the_other_tables():
    assert [(entry.mean, entry.std) for entry in paper_table("T1")] == [
        (23.60, 0.12),
        (24.84, 0.37),
        (25.88, 0.56),
        (23.74, 0.09),
    ]
    assert [entry.mean for entry in paper_table("T2a")] == [23.92, 23.60, 23.68, 24.27, 23.74, 24.05, 41.67, 26.22]
    assert [entry.mean for entry in paper_table("T2b")] == [23.84, 23.60, 24.11, 23.74]


@pytest.mark.parametrize("name", TABLES)
def test_every_rate_follows_from_its_rule(name: Literal["minibatches", "T1", "T2a", "T2b"]):
    for entry in paper_table(name):
        rule = RULES.get(entry.label, linear_scaling)
        assert entry.target_lr == pytest.approx(rule(BASE_RATES.get(entry.label, 0.1), 256, entry.minibatch))


@pytest.mark.parametrize(
    "label", ["baseline", "warmup=gradual", "base_lr=0.1", "zero_gamma=true"], ids=lambda label: label
)
def test_the_papers_recipe_has_one_error_in_every_table(label: str):
    flat = {entry.minibatch: entry.mean for entry in paper_table()}
    found = [entry for name in TABLES for entry in paper_table(name) if entry.label == label]
    assert found
    assert all(entry.mean == flat[entry.minibatch] for entry in found)


def test_a_sample_needs_a_std():
    assert PaperEntry(8192, 0.1, 41.67, label="scaling=fixed").sample is None
    assert paper_samples()[8192] == Sample.known(23.74, 0.09, 5)
    assert len(paper_samples()) == 10


def test_the_paper_holds_to_8k_and_is_worse_at_16k():
    verdicts = judge_minibatches(256, paper_samples())
    assert [size for size, verdict in verdicts.items() if verdict.state == "holds"] == [
        *(128, 512, 1024, 2048, 4096, 8192)
    ]
    assert {size: verdict.state for size, verdict in verdicts.items() if verdict.state != "holds"} == {
        16384: "worse",
        32768: "untested",
        65536: "untested",
    }
    assert verdicts[8192].text == "holds: at most 0.27 points above"
    assert verdicts[16384].text == "worse: 1.19 points, p < 0.001"
    assert verdicts[32768].text == "not tested: minibatch 16384 does not hold; 3.95 points above"
    assert summary(256, verdicts) == "holds to 8192, worse at 16384"


def test_the_papers_other_warmups_are_worse():
    rows = {entry.label: entry.sample for entry in paper_table("T1")}
    gradual, none, constant = rows["warmup=gradual"], rows["warmup=none"], rows["warmup=constant"]
    assert gradual is not None
    assert none is not None
    assert constant is not None
    verdicts = judge_arms([(none, gradual), (constant, gradual)])
    assert [verdict.state for verdict in verdicts] == ["worse", "worse"]
    assert [round(verdict.difference, 2) for verdict in verdicts] == [1.10, 2.14]

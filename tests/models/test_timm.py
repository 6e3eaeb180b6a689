"""timm's networks train: a model of each family that has BatchNorm, as benchmarks/networks.py found them."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FOUND: dict[str, Any] = json.loads((BENCHMARKS / "results" / "networks.json").read_text(encoding="utf-8"))
pytestmark = [pytest.mark.vision, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/networks.py."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("networks")


@pytest.mark.parametrize("row", FOUND["rows"], ids=lambda row: row["model"])
def test_a_model_of_each_family_is_k_separate_passes_and_takes_a_step(networks: ModuleType, row: dict[str, Any]):
    found = networks.tried(row["model"], row["size"])
    assert math.isfinite(found["loss"])
    assert {key: found[key] for key in ("layers", "classes", "batchnorm")}.items() <= row.items()
    if found["batchnorm"] == "ghost":
        assert networks.within(found, "outputs")
        assert networks.within(found, "gradients")
        assert max(networks.BOUND, found["outputs_apart"]) < 1e-3 * found["pooled_apart"]


def test_the_list_has_every_family_of_timm(networks: ModuleType):
    listed = {row["family"] for row in FOUND["rows"]} | {*FOUND["without"]}
    assert listed - {""} == {*networks.families()}

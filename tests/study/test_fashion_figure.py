"""benchmarks/fashion_figure.py: what it asks for, and in miniature that it goes on where it was stopped."""

import importlib
import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onehour.cli import make_parser
from onehour.recipes import fashion
from onehour.study.spec import spec_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/fashion_figure.py."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("fashion_figure")


def entries_of(errors: dict[int, float], n: int = 0) -> dict[tuple[str, int], Any]:
    return {("", size): {"mean": error, "n": n} for size, error in errors.items()}


@pytest.mark.parametrize(
    ("errors", "broken"),
    [
        ({64: 6.5, 512: 9.0, 1024: 9.0, 2048: 7.4, 4096: 7.6, 8192: 80.0}, [4096]),
        ({64: 6.5, 1024: 6.6, 2048: 6.7, 4096: 6.8, 8192: 7.0}, []),
    ],
)
def test_the_break_is_the_first_minibatch_above_16_times_a_point_higher(
    figure: Any, errors: dict[int, float], broken: list[int]
):
    assert figure.broken_at(entries_of(errors)) == broken


def cells_of(commands: Iterable[list[str]]) -> dict[tuple[str, int], int]:
    """How many seeds each arm and minibatch is trained with."""
    cells = set()
    for command in commands:
        options = make_parser().parse_args(command)
        seeds = range(options.seed, options.seed + options.seeds)
        more = {"reference_seeds": options.reference_seeds}
        spec = spec_of(fashion(), options.minibatch, seeds, options.arm, options.arms_at, **more)
        cells |= {(cell.arm, cell.recipe.minibatch, cell.recipe.seed) for cell in spec.cells()}
    counts: dict[tuple[str, int], int] = {}
    for arm, minibatch, _ in cells:
        key = (",".join("=".join(change) for change in arm), minibatch)
        counts[key] = counts.get(key, 0) + 1
    return counts


def test_the_sweeps_have_the_cells_that_were_promised(figure: Any):
    counts = cells_of(figure.commands({}, entries_of({64: 6.5, 1024: 7.0, 2048: 9.0})))
    rates = ("warmup=none", "warmup=constant", "scaling=fixed", "scaling=sqrt")
    others = ("per_worker=8", "per_worker=16", "per_worker=64", "zero_gamma=false")
    assert counts == (
        {("", 64 * times): 10 if times == 1 else 5 for times in figure.TIMES}
        | {(arm, size): 5 for arm in rates for size in (1024, 2048)}
        | {(arm, 1024): 5 for arm in others}
    )


def test_what_is_known_is_not_trained_again(figure: Any):
    known = entries_of({64 * times: 6.5 for times in figure.TIMES}, n=5)
    known["", 64]["n"] = 9
    known |= {(arm, 1024): {"mean": 7.0, "n": 5} for arm in ("per_worker=8", "per_worker=16", "per_worker=64")}
    known |= {(arm, 1024): {"mean": 7.0, "n": 5} for arm in ("warmup=none", "warmup=constant", "scaling=fixed")}
    known["scaling=sqrt", 1024] = {"mean": 7.0, "n": 5}
    arms = ("per_worker=8", "per_worker=16", "per_worker=64", "zero_gamma=false")
    assert cells_of(figure.commands(known, known)) == {("", 64): 10, ("", 1024): 5} | {(arm, 1024): 5 for arm in arms}
    known["zero_gamma=false", 1024] = {"mean": 7.0, "n": 5}
    known["", 64]["n"] = 10
    assert not list(figure.commands(known, known))


def test_claims_are_of_the_errors(figure: Any):
    def means(errors: dict[int, float]) -> dict[tuple[str, int], float]:
        return {("", size): error for size, error in errors.items()}

    flat = dict.fromkeys((64 * times for times in figure.TIMES), 6.0)
    held = [claim["holds"] for claim in figure.claims(means(flat | {4096: 40.0}))]
    assert held == [True] * 4
    broken = [claim["holds"] for claim in figure.claims(means(flat | {64: 7.0, 512: 8.0, 1024: 8.1}))]
    assert broken == [False] * 4


@pytest.mark.slow
def test_in_miniature_it_writes_its_results_and_trains_nothing_twice(
    figure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    draw = np.random.default_rng(0)
    for side, count in (("train", 1024), ("t10k", 64)):
        for kind, shape in (("images-idx3", (count, 8, 8)), ("labels-idx1", (count,))):
            array = draw.integers(0, 10, shape, dtype=np.uint8)
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *shape)
            (tmp_path / f"{side}-{kind}-ubyte").write_bytes(header + array.tobytes())
    task = ["fashion", "--data", str(tmp_path), "--model", "resnet8", "--epochs", "1", "--seed", "6000"]
    for name, value in {
        "TASK": [*task, "--base-minibatch", "8", "--per-worker", "4"],
        "BASE": 8,
        "SHOWN": 128,
        "OUT": tmp_path / "out",
    }.items():
        monkeypatch.setattr(figure, name, value)
    shared = importlib.import_module("digits_figure")
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(shared, "claim", lambda out, script: None)
    monkeypatch.setattr(shared, "write", lambda script, name, content: written.append(json.loads(json.dumps(content))))
    monkeypatch.setattr(shared, "IMAGES", tmp_path)
    monkeypatch.setattr("sys.argv", ["fashion_figure.py"])
    assert figure.main() == 0
    first = written[-1]
    runs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*/summary.json")}
    assert len(runs) in (85, 105), "with arms at the break, if there was one"
    assert figure.main() == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").glob("*/summary.json")} == runs
    assert written[-1] == first
    assert len(written) == 2 * len(first["commands"]), "after each sweep"
    groups = {row["group"] for row in first["entries"]}
    assert groups == {"minibatch", "rate", "n", "pitfall"}
    assert {f"fashion{end}.svg" for end in ("-time", "-curves")} <= {path.name for path in tmp_path.iterdir()}

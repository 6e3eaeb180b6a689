"""Values of the user's own expressions, and the epochs that their loops plan, read without running their code."""

import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from onehour.check.observe.source import planned_epochs, quotients, trainer_epochs


def run(folder: Path, text: str, ask: Any, **names: Any) -> None:
    """Run a function of the user's whose body is a text that calls `ask`."""
    path = folder / "mine.py"
    body = "\n".join(f"    {line}" for line in text.splitlines())
    path.write_text(f"def mine():\n{body}\n")
    names |= {"ask": ask}
    exec(compile(path.read_text(), str(path), "exec"), names)
    names["mine"]()


def caller() -> Any:
    return sys._getframe(2)


class Meter:
    def __init__(self) -> None:
        self.sum, self.count = 9.0, 12

    @property
    def average(self) -> float:
        raise RuntimeError("the user's code was run")


VALUES = [
    ("3 / 4", [0.75]),
    ("100 * correct / total", [75.0, 300.0]),
    ("correct.item() / total", [3.0, 0.75]),
    ("sum(rates) / len(rates)", [0.625, 1.25]),
    ("float(correct) / counts['all']", [0.75, 3.0]),
    ("torch.stack(rates).mean()", [0.625]),
    ("torch.tensor(rates).mean().item()", [0.625]),
    ("numpy.mean(rates)", [0.625]),
    ("statistics.mean(rates)", [0.625]),
    ("meter.sum / meter.count", [0.75]),
    ("meter.average / 2", []),
    ("unknown(correct) / total", []),
    ("rates / 2", []),
]


@pytest.mark.parametrize(("expression", "expected"), VALUES)
def test_a_value_before_it_is_computed(expression: str, expected: list[float], tmp_path: Path):
    import statistics

    seen: list[float] = []
    names = {"correct": torch.tensor(3), "total": 4, "rates": [0.5, 0.75], "counts": {"all": 4}, "meter": Meter()}
    modules = {"torch": torch, "numpy": numpy, "statistics": statistics}

    def unknown(value: Any) -> float:
        raise RuntimeError("the user's code was run")

    def ask() -> bool:
        seen.extend(quotients(caller()))
        return True

    run(tmp_path, f"return ask() or ({expression})", ask, **names, **modules, unknown=unknown)
    assert sorted(round(value, 9) for value in seen) == pytest.approx(sorted(expected))


LOOPS = [
    ("for epoch in range(90):", 90),
    ("for epoch in range(start, epochs):", 88),
    ("for epoch in range(epochs + 1):", 91),
    ("for epoch in tqdm(range(args.epochs)):", 7),
    ("for epoch in range(config['epochs']):", 5),
    ("for epoch in trange(epochs):", 90),
    ("for epoch in range(len(names)):", None),
    ("for epoch in names:", None),
    ("while epochs:", None),
]


@pytest.mark.parametrize(("head", "expected"), LOOPS)
def test_the_epochs_that_a_loop_plans(head: str, expected: int | None, tmp_path: Path):
    class Arguments:
        epochs = 7

    seen: list[int | None] = []

    def ask() -> list[int]:
        seen.append(planned_epochs([caller()]))
        return []

    names = {"start": 2, "epochs": 90, "config": {"epochs": 5}, "names": ["a"], "args": Arguments()}
    run(tmp_path, f"{head}\n    for batch in ask():\n        pass\n    break", ask, **names, tqdm=list, trange=range)
    assert seen == [expected]


@pytest.mark.parametrize(
    ("module", "names", "expected"),
    [
        ("lightning.pytorch.loops.fit_loop", "self", 12),
        ("pytorch_lightning.loops.fit_loop", "self", 12),
        ("transformers.trainer", "num_train_epochs", 12),
        ("mine", "self", None),
    ],
)
def test_the_epochs_that_a_trainer_plans(module: str, names: str, expected: int | None, tmp_path: Path):
    class Loop:
        def __init__(self) -> None:
            self.max_epochs = 12

    seen: list[int | None] = []
    value = Loop() if names == "self" else 12
    text = f"{names} = value\nreturn ask()"
    run(tmp_path, text, lambda: seen.append(trainer_epochs(caller())), value=value, __name__=module)
    assert seen == [expected]

"""The examples' tasks on 1, 2 and 3 processes against plain loops over the concatenated minibatch, in float64."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onehour import Recipe, SampleStream
from onehour.cli import main
from onehour.training.record import Run
from onehour.training.weights import read_weights

TASKS = Path(__file__).parents[1] / "examples" / "tasks"
EXAMPLES = ("segmentation", "regression", "pairs", "characters")
K, N = 5, 8
Losses = tuple[Tensor, Tensor]
"""One number for each loss, and how much each counts."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(TASKS)
    yield
    for name in EXAMPLES:
        sys.modules.pop(name, None)


def segmentation(model: nn.Module, samples: list[Any]) -> Losses:
    """Of the minibatch's workers together: each pixel that is labelled."""
    images, masks = torch.stack([image for image, _ in samples]).double(), torch.stack([mask for _, mask in samples])
    chosen = masks != 255
    logits = model(images).permute(0, 2, 3, 1)[chosen]
    return -logits.log_softmax(1).gather(1, masks[chosen][:, None])[:, 0], torch.ones(len(logits), dtype=torch.float64)


def regression(model: nn.Module, samples: list[Any]) -> Losses:
    inputs = torch.stack([sample["inputs"] for sample in samples]).double()
    weights, lengths = (torch.stack([sample[key] for sample in samples]).double() for key in ("weight", "length"))
    return weights * (model(inputs)[:, 0] - lengths) ** 2, weights


def pairs(model: nn.Module, samples: list[Any]) -> Losses:
    """Pairs of the same worker alone."""
    points = model(torch.stack([image for image, _ in samples]).double())
    losses = []
    for i in range(len(samples)):
        for j in range(i + 1, len(samples)):
            if i // N != j // N:
                continue
            distance = (points[i] - points[j]).square().sum().sqrt()
            if samples[i][1] == samples[j][1]:
                losses.append(distance**2)
            elif distance < 1:
                losses.append((1 - distance) ** 2)
    return torch.stack(losses), torch.ones(len(losses), dtype=torch.float64)


def characters(model: nn.Module, samples: list[Any]) -> Losses:
    """Line by line, without padding."""
    losses = [F.cross_entropy(model(line[None, :-1])[0], line[1:], reduction="none") for line in samples]
    every = torch.cat(losses)
    return every, torch.ones_like(every)


LOSSES: dict[str, Callable[[nn.Module, list[Any]], Losses]] = {
    "segmentation": segmentation,
    "regression": regression,
    "pairs": pairs,
    "characters": characters,
}


def trained(
    mine: ModuleType, recipe: Recipe, start: Path, *, updates: int = 20, of_means: bool = False
) -> dict[str, Tensor]:
    """The weights that a plain loop leaves; `of_means` averages the workers' means, which is wrong."""
    model = (mine.Model() if recipe.name == "characters" else mine.net()).double()
    model.load_state_dict(torch.load(start, weights_only=True))
    if recipe.optimizer == "adamw":
        assert recipe.adam is not None
        options: dict[str, Any] = {key: recipe.adam[key] for key in ("betas", "eps", "weight_decay")}
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), **options)
    else:
        decay = recipe.weight_decay
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, weight_decay=decay)
    data, stream = mine.data()[0], SampleStream(samples=400, minibatch=recipe.workers, seed=recipe.seed)
    for iteration in range(updates):
        samples = [data[int(i)] for worker in range(K) for i in stream.indices(iteration, worker)]
        optimizer.zero_grad()
        if of_means:
            for worker in range(K):
                losses, counts = LOSSES[recipe.name](model, samples[worker * N : (worker + 1) * N])
                (losses.sum() / counts.sum() / K).backward()
        else:
            losses, counts = LOSSES[recipe.name](model, samples)
            (losses.sum() / counts.sum()).backward()
        optimizer.param_groups[0]["lr"] = recipe.schedule(iteration * recipe.minibatch / 400)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float(((one[name] - other[name]).abs() / other[name].abs().clamp(min=1)).max()) for name in other)


@pytest.mark.parametrize("name", EXAMPLES)
def test_workers_with_unequal_counts_are_one_minibatch(world: Callable[[int], Path], name: str):
    run = Run(world(1) / name)
    mine, start = importlib.import_module(name), world(1) / f"{name}-start.pt"
    expected = trained(mine, run.recipe, start)
    for processes in (1, 2, 3):
        assert largest_difference(read_weights(world(processes) / name), expected) <= 1e-12, processes
    right, wrong = (trained(mine, run.recipe, start, updates=5, of_means=flag) for flag in (False, True))
    assert largest_difference(wrong, right) > 1e-5


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_evaluation_is_the_same_on_any_number_of_processes(world: Callable[[int], Path], name: str):
    first, *others = (Run(world(processes) / name).untrained for processes in (1, 2, 3))
    assert first is not None
    assert first == others[0] == others[1]
    assert Run(world(1) / name).metrics[-1]["metrics"].keys() == first["metrics"].keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_learn_as_they_stand(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code = main(["train", str(TASKS / f"{name}.toml"), "--trust", "--loaders", "0", "--out", str(tmp_path / "run")])
    run = Run(tmp_path / "run")
    assert code == 0
    assert run.untrained is not None
    before, after = run.untrained["top1_error"], run.final_error
    assert (after > before + 5) if run.metric.higher_is_better else (after < 0.8 * before)
    assert f"final {run.metric.name} {run.metric.of(after)}" in capsys.readouterr().out

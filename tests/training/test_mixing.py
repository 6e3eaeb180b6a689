"""Runs with erased, mixed and smoothed training data: updates are the equations', wherever their parts are computed."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from steps import step_of
from torch import Tensor, nn
from wires import on_threads

from onehour import Recipe
from onehour.api import train
from onehour.data.augment import draw_erasure
from onehour.data.loader import Feed
from onehour.data.mixing import draw_mix
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.rules.keys import seed_for
from onehour.rules.shuffle import SampleStream
from onehour.training.evaluate import evaluate
from onehour.training.feeds import pick_share
from onehour.training.record import StoppedError
from onehour.training.state import digest_of, model_state
from onehour.training.task import summed_cross_entropy

N, K, STEPS, EPSILON, RATE = 3, 5, 6, 0.1, 0.2
MIXED: dict[str, Any] = {"random_erasing": 0.5, "mixup": 0.4, "cutmix": 1.0, "label_smoothing": EPSILON}
SIZES: dict[str, Any] = {"samples": 48, "classes": 3, "minibatch": N * K, "per_worker": N, "base_minibatch": N * K}
SGD: dict[str, Any] = {"base_lr": RATE, "momentum": 0, "nesterov": False, "weight_decay": 0, "warmup": "none"}
RECIPE = Recipe(precision="float64", **SIZES, **SGD, **MIXED)


def smoothed(logits: Tensor, label: int) -> Tensor:
    """−Σ q log p with q = 1 − ε + ε/C for the label, ε/C for the others."""
    target = torch.full((3,), EPSILON / 3, dtype=torch.float64)
    target[label] += 1 - EPSILON
    return -(target * logits.log_softmax(0)).sum()


def linear() -> nn.Module:
    """The same each time, and no generator that threads share is drawn from."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
    return model


def transcribed(images: Tensor, labels: Tensor) -> Tensor:
    """The weights after some updates, a sample at a time."""
    model, stream = linear(), SampleStream(samples=48, minibatch=RECIPE.workers, seed=0)
    for t in range(STEPS):
        model.zero_grad()
        for j in range(K):
            epochs, chosen = (array.tolist() for array in stream.epochs_and_indices(t, j))
            erased = images[chosen].clone()
            for image, epoch, index in zip(erased, epochs, chosen, strict=True):
                top, bottom, left, right = draw_erasure(4, 4, seed_for(0, "erase", epoch, index), 0.5)
                image[:, top:bottom, left:right] = 0
            mix = draw_mix(seed_for(0, "mix", t, j), mixup=0.4, cutmix=1.0, height=4, width=4)
            for i in range(N):
                mixed = mix.weight * erased[i] + (1 - mix.weight) * erased[i - 1]
                box = slice(None), slice(mix.top, mix.bottom), slice(mix.left, mix.right)
                mixed[box] = erased[i - 1][box]
                logits = model(mixed[None])[0]
                one, other = (smoothed(logits, int(labels[chosen[number]])) for number in (i, i - 1))
                ((mix.share * one + (1 - mix.share) * other) / (N * K)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= RATE * parameter.grad
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def taken(recipe: Recipe, data: Any, group: Group, together: int) -> nn.Module:
    """A model after the same updates, on this process."""
    model, stream = linear(), SampleStream(samples=48, minibatch=recipe.workers, seed=0)
    step = step_of(recipe, model, passes(pick_share(recipe, group), together), group=group)
    batches = Feed(data, seed=0, loaders=0, device=group.device, stream=stream).passes(step.passes, start=0, stop=STEPS)
    for t in range(STEPS):
        assert step(t, batches).alive.all()
    return model


def test_updates_are_those_of_the_equations_on_any_number_of_processes(
    tiny: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    train_side, _ = tiny.data()
    data = torch.utils.data.TensorDataset(train_side.tensors[0].double(), train_side.tensors[1])
    expected = transcribed(*data.tensors)
    for processes, together in ((1, 1), (1, 5), (2, 2)):
        for model in on_threads(monkeypatch, processes, lambda group, g=together: taken(RECIPE, data, group, g)):
            weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    canonical = RECIPE.replace(reduce="canonical")
    models = [m for p in (1, 2) for m in on_threads(monkeypatch, p, lambda group: taken(canonical, data, group, 1))]
    assert len({digest_of(model_state(model)) for model in models}) == 1


def test_an_evaluation_neither_mixes_nor_smooths(tiny: ModuleType):
    _, validation = tiny.data()
    feed = Feed(validation, seed=0, loaders=0, device=torch.device("cpu"))
    model = linear()
    (found,) = evaluate(model, feed, RECIPE, group=Group())
    images, labels = validation.tensors
    assert found.loss == pytest.approx(nn.functional.cross_entropy(model(images.double()), labels).item(), rel=1e-12)


def test_smoothing_is_torchs_for_seeds_together_too():
    logits = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 3
    each = torch.stack([smoothed(row, int(label)) for row, label in zip(logits, labels, strict=True)])
    torch.testing.assert_close(summed_cross_entropy(logits, labels, smoothing=EPSILON), each.sum(), rtol=0, atol=1e-12)
    together = summed_cross_entropy(logits, labels.view(4, 2), smoothing=EPSILON)
    torch.testing.assert_close(together, each.view(4, 2).sum(0), rtol=0, atol=1e-12)


def test_loaders_and_a_resume_change_no_bit(tiny: ModuleType, tmp_path: Path):
    recipe = tiny.recipe(data="tinytask:listed", classes=3, **MIXED)
    whole = train(recipe, out=tmp_path / "whole", loaders=0)
    calls = iter(range(99))
    with pytest.raises(StoppedError):
        train(recipe, out=tmp_path / "run", loaders=1, stop_asked=lambda: next(calls) == 3)
    resumed = train(recipe, out=tmp_path / "run", loaders=2)
    assert resumed.summary["state_sha256"] == whole.summary["state_sha256"]
    assert resumed.metrics == whole.metrics
    plain = train(recipe.replace(mixup=0, cutmix=0, random_erasing=0), out=tmp_path / "plain", loaders=0)
    assert plain.summary["state_sha256"] != whole.summary["state_sha256"]

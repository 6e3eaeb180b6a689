"""The paper's update, written once more with plain torch from its equations, against the trainer's."""

import copy
from typing import Any

import torch
from steps import step_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from onehour.config import Recipe
from onehour.data.loader import Feed
from onehour.data.sources import Data
from onehour.dist.group import Group
from onehour.models.resnet import resnet18
from onehour.rules.initialize import init_weights_
from onehour.rules.shuffle import SampleStream
from onehour.training.build import build_model

N, PER_WORKER, WORKERS, STEPS = 64, 4, 3, 3
MINIBATCH = PER_WORKER * WORKERS
MOMENTUM, DECAY, BASE, BASE_MINIBATCH, WARMUP = 0.9, 1e-4, 0.05, 4, 5

SIZES: dict[str, Any] = {"samples": N, "minibatch": MINIBATCH, "per_worker": PER_WORKER}
RECIPE = Recipe(base_lr=BASE, base_minibatch=BASE_MINIBATCH, classes=10, precision="float64", **SIZES)


def transcribed(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, order: list[list[torch.Tensor]]) -> dict:
    """Eq 2-10 in the order in which the paper has them; `order[t][j]` are the samples of worker j in iteration t."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    undecayed = {id(p) for m in norms for p in m.parameters()}
    for norm in norms:
        norm.momentum = 1.0  # the running statistics are then those of the worker that has just passed
    running = [[torch.zeros_like(m.running_mean), torch.ones_like(m.running_var)] for m in norms]  # type: ignore[arg-type]
    velocity = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    target = BASE * MINIBATCH / BASE_MINIBATCH  # §2.1
    for t in range(STEPS):
        lr = BASE + (target - BASE) * t / (WARMUP * N / MINIBATCH)  # §2.2
        model.zero_grad()
        means = [torch.zeros_like(mean) for mean, _ in running]
        variances = [torch.zeros_like(variance) for _, variance in running]
        for j in range(WORKERS):
            chosen = order[t][j]
            losses = F.cross_entropy(model(images[chosen]), labels[chosen], reduction="none")
            (losses.sum() / MINIBATCH).backward()  # §3, Remark 3; gradients add up over the workers
            for number, norm in enumerate(norms):
                means[number] += norm.running_mean / WORKERS  # type: ignore[operator]
                variances[number] += norm.running_var / WORKERS  # type: ignore[operator]
        with torch.no_grad():
            for number, (mean, variance) in enumerate(running):
                mean.mul_(0.9).add_(0.1 * means[number])  # §2.3
                variance.mul_(0.9).add_(0.1 * variances[number])
            for name, p in model.named_parameters():
                assert p.grad is not None
                gradient = p.grad if id(p) in undecayed else p.grad + DECAY * p  # §3, Remark 1; §5.1
                velocity[name] = MOMENTUM * velocity[name] + gradient  # eq 9
                p -= lr * (gradient + MOMENTUM * velocity[name])  # Nesterov
    for norm, (mean, variance) in zip(norms, running, strict=True):
        norm.running_mean.copy_(mean)  # type: ignore[union-attr]
        norm.running_var.copy_(variance)  # type: ignore[union-attr]
    return model.state_dict()


def test_three_updates_of_a_resnet18_equal_the_papers_equations():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(N, 3, 32, 32, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (N,), generator=generator)
    torch.manual_seed(0)
    model = init_weights_(resnet18(classes=10)).double()
    stream = SampleStream(samples=N, minibatch=RECIPE.workers, seed=0)
    order = [[torch.from_numpy(stream.indices(t, j)) for j in range(WORKERS)] for t in range(STEPS)]
    expected = transcribed(copy.deepcopy(model), images, labels, order)

    train = TensorDataset(images, labels)
    data = Data.of(train, TensorDataset(images[:2], labels[:2]))
    group, passes = Group(), [range(2), range(2, 3)]
    ours = build_model(RECIPE, data, group.device, model)
    step = step_of(RECIPE, ours, passes)
    feed = Feed(train, seed=stream.seed, loaders=0, device=group.device, stream=stream)
    batches = feed.passes(passes, start=0, stop=STEPS)
    ours.train()
    for t in range(STEPS):
        step(t, batches)
    state = ours.state_dict()
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):
            difference = (state[name] - value).abs() / value.abs().clamp(min=1)
            assert float(difference.max()) <= 1e-12, name
    assert int(state["bn1.num_batches_tracked"]) == STEPS

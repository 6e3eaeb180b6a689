"""Each pitfall is the one wrong thing that it says, against its equation in float64, and everything else is right."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from exactness import exact
from steps import step_of
from torch import Tensor, nn
from torch.optim import SGD

from onehour import Recipe
from onehour.api import train
from onehour.config import PITFALLS
from onehour.dist.placement import passes
from onehour.rules.batchnorm import convert_batchnorm
from onehour.rules.keys import seed_for
from onehour.rules.momentum import InsideSGD, correct_momentum, momentum_form, set_rate, velocity_inside
from onehour.rules.shuffle import permutation
from onehour.training.decisions import BROKEN, Decisions, decisions_of
from onehour.training.record import StoppedError

N, K, SAMPLES = 2, 3, 60  # n, k and N: ten iterations an epoch
LAMBDA, MOMENTUM = 0.1, 0.9
IMAGES = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(SAMPLES) % 3


def recipe(pitfall: str | None = None, **changes: Any) -> Recipe:
    """The rate grows from .1 to .3 in two epochs of four."""
    common: dict[str, Any] = {"minibatch": N * K, "per_worker": N, "base_minibatch": N, "samples": SAMPLES, "epochs": 4}
    common |= {"warmup_epochs": 2, "milestones": ("3",), "weight_decay": LAMBDA, "precision": "float64"}
    return Recipe(pitfall=pitfall, **(common | changes))


def net() -> Any:
    """BatchNorm layers with momenta of their own; γ and β are not the initial ones."""
    torch.manual_seed(0)
    layers = (nn.BatchNorm1d(3, momentum=0.1), nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Linear(4, 3))
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else None
    return model


class Trained:
    """What some iterations of a recipe leave; `seen` after each of them."""

    def __init__(self, recipe: Recipe, iterations: int = 1, *, together: int = 1) -> None:
        self.before = {name: p.detach().clone() for name, p in net().named_parameters()}
        self.model = convert_batchnorm(net(), recipe.per_worker).train()
        decisions = decisions_of(recipe)
        self.optimizer = decisions.optimizer(self.model)
        share = passes(range(K), together)
        step = step_of(recipe, self.model, share, optimizer=self.optimizer)
        totals = torch.zeros(2, dtype=torch.float64)
        self.seen: list[dict[str, dict[str, Tensor]]] = []
        for iteration in range(iterations):
            chosen = [decisions.stream().indices(iteration, workers) for workers in share]
            totals += step(iteration, iter([(IMAGES[i], LABELS[i]) for i in chosen])).sums[:, 0]
            named = dict(self.model.named_parameters())
            gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
            velocity = {name: self.optimizer.state[p]["momentum_buffer"] for name, p in named.items()}
            state = self.model.state_dict()
            parts = {"weights": state, "gradients": gradients, "velocity": velocity}
            self.seen.append({kind: {n: t.clone() for n, t in tensors.items()} for kind, tensors in parts.items()})
        self.loss = totals.tolist()

    def __getattr__(self, name: str) -> dict[str, Tensor]:
        return self.seen[-1][name]


def moved(gradient: Tensor, weight: Tensor, *, decay: float, rate: float = 0.1) -> Tensor:
    """The first step of Nesterov's form: w' = w − η·(1 + m)·(g + λw)."""
    return weight - rate * (1 + MOMENTUM) * (gradient + decay * weight)


def decay_of(name: str) -> float:
    return 0.0 if name.split(".")[0] in ("0", "2") else LAMBDA  # γ and β


def test_gradients_summed_instead_of_averaged_are_k_times_too_large_and_the_decay_is_not():
    right, wrong = Trained(recipe()), Trained(recipe("gradient-sum-not-mean"))
    for name, gradient in right.gradients.items():
        exact(wrong.gradients[name], K * gradient)
        expected = moved(K * gradient, right.before[name], decay=decay_of(name))
        exact(wrong.weights[name], expected)
    exact(wrong.loss, right.loss)  # what is told is the mean loss
    exact(running(wrong), running(right))


def test_decayed_batchnorm_is_all_that_is_wrong():
    right, wrong = Trained(recipe()), Trained(recipe("decay-on-batchnorm"))
    exact(wrong.gradients, right.gradients)
    for name, gradient in right.gradients.items():
        exact(right.weights[name], moved(gradient, right.before[name], decay=decay_of(name)))
        exact(wrong.weights[name], moved(gradient, right.before[name], decay=LAMBDA))
    exact(running(wrong), running(right))


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_rate_inside_the_velocity_is_equation_10_without_its_factor_while_it_changes(nesterov: bool):
    chosen = recipe("momentum-inside-uncorrected", nesterov=nesterov)
    wrong = Trained(chosen, 8)
    for name, weight in wrong.before.items():
        velocity = torch.zeros_like(weight)
        for iteration, seen in enumerate(wrong.seen):
            rate = chosen.schedule(iteration * N * K / SAMPLES)
            move = rate * (seen["gradients"][name] + decay_of(name) * weight)
            velocity = MOMENTUM * velocity + move
            weight = weight - (MOMENTUM * velocity + move if nesterov else velocity)
            exact(seen["weights"][name], weight)
    right = Trained(recipe(nesterov=nesterov), 8)
    assert max((wrong.weights[name] - right.weights[name]).abs().max() for name in wrong.before) > 1e-3


@pytest.mark.parametrize("changes", [{"optimizer": "adam"}, {"momentum": 0.0, "nesterov": False}])
def test_only_sgd_with_momentum_can_have_its_rate_inside(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="momentum-inside-uncorrected needs optimizer sgd with momentum"):
        decisions_of(recipe("momentum-inside-uncorrected", scaling="fixed", **changes))


@pytest.mark.parametrize(("samples", "n", "k"), [(60, 2, 3), (64, 4, 4), (61, 2, 3), (100, 4, 2)])
def test_overlapping_shards_repeat_samples_between_workers_and_miss_others(samples: int, n: int, k: int):
    stream = decisions_of(recipe("overlapping-shards", samples=samples, minibatch=n * k, per_worker=n)).stream()
    shares: dict[tuple[int, int], list[int]] = {}
    for iteration in range(3 * samples // (n * k) + 1):
        for worker in range(k):
            epochs, indices = stream.epochs_and_indices(iteration, worker)
            for epoch, index in zip(epochs, indices, strict=True):
                shares.setdefault((int(epoch), worker), []).append(int(index))
    for epoch in range(3):
        by_worker = [shares[epoch, worker] for worker in range(k)]
        assert sum(map(len, by_worker)) == samples  # as much work as in the right run
        assert all(len(set(share)) == len(share) for share in by_worker)
        assert set.intersection(*map(set, by_worker[:2]))
        assert len(set().union(*by_worker)) < samples
    assert sorted(shares[0, 0]) != sorted(shares[1, 0])


def test_a_worker_of_overlapping_shards_takes_its_places_in_a_permutation_of_its_own():
    chosen = recipe("overlapping-shards", seed=5)
    stream, right = decisions_of(chosen).stream(), decisions_of(recipe(seed=5)).stream()
    for worker in range(K):
        own = permutation(SAMPLES, seed_for(5, "worker", worker), 0)
        places = np.arange(SAMPLES).reshape(-1, K)[:, worker]
        found = np.concatenate([stream.indices(t, worker) for t in range(SAMPLES // (N * K))])
        np.testing.assert_array_equal(found, own[places])
        assert not np.array_equal(found, np.concatenate([right.indices(t, worker) for t in range(10)]))
    for workers in (range(2), range(1, 3), None):  # fused passes take the same
        alone = [stream.indices(7, worker) for worker in workers or range(K)]
        np.testing.assert_array_equal(stream.indices(7, workers), np.stack(alone, 1).reshape(-1))


def running(trained: Trained) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in trained.weights.items() if "running" in name}


def replayed(iterations: int, workers: list[int], weights: Callable[[int], dict[str, Tensor]]) -> dict[str, Tensor]:
    """torch's own layers, whose statistics move at each of the workers' passes."""
    model, stream = net().train(), Decisions(recipe()).stream()
    for iteration in range(iterations):
        model.load_state_dict(weights(iteration), strict=False)
        for worker in workers:
            model(IMAGES[stream.indices(iteration, worker)])
    return {name: tensor for name, tensor in model.state_dict().items() if "running" in name}


@pytest.mark.parametrize("together", [1, 2, 3])
@pytest.mark.parametrize(
    ("pitfall", "workers"), [("batchnorm-stats-of-rank-0", [0]), ("batchnorm-stats-k-times", [0, 1, 2])]
)
def test_statistics_of_one_worker_and_statistics_moved_k_times(pitfall: str, workers: list[int], together: int):
    right, wrong = Trained(recipe(), 3), Trained(recipe(pitfall), 3, together=together)
    parameters = [right.before, *(seen["weights"] for seen in right.seen)]
    learned = [{n: t for n, t in state.items() if n in right.before} for state in parameters]
    exact(running(wrong), replayed(3, workers, lambda iteration: learned[iteration]))
    exact({name: wrong.weights[name] for name in right.before}, learned[-1])  # weights never see them
    assert max((running(wrong)[name] - tensor).abs().max() for name, tensor in running(right).items()) > 1e-3


def test_a_warmup_by_epochs_is_a_staircase_and_right_after_it():
    right, wrong = decisions_of(recipe()), decisions_of(recipe("warmup-per-epoch"))
    rates = [wrong.rate(iteration) for iteration in range(40)]
    assert rates[:20] == [right.rate(0)] * 10 + [right.rate(10)] * 10
    assert rates[10] == pytest.approx(0.2)
    assert rates[20:] == [right.rate(iteration) for iteration in range(20, 40)]


@pytest.mark.parametrize("changes", [{"warmup": "none"}, {"minibatch": N}])
def test_without_a_warmup_there_is_no_staircase(changes: dict[str, Any]):
    """Cosine decay changes at every iteration, and is no part of the warmup."""
    right, wrong = (decisions_of(recipe(pitfall, decay="cosine", **changes)) for pitfall in (None, "warmup-per-epoch"))
    assert [wrong.rate(t) for t in range(30)] == [right.rate(t) for t in range(30)]


@pytest.mark.parametrize("pitfall", [None, *PITFALLS])
def test_fused_passes_and_one_worker_a_pass_give_the_same(pitfall: str | None):
    apart, pairs, fused = (Trained(recipe(pitfall), 3, together=together) for together in (1, 2, 3))
    for other in (pairs, fused):
        exact(other.weights, apart.weights)
        exact(other.velocity, apart.velocity)


def test_every_pitfall_of_a_recipe_is_broken_here_and_none_is_canonical():
    assert tuple(BROKEN) == PITFALLS
    assert type(decisions_of(recipe())) is Decisions
    for pitfall in PITFALLS:
        assert type(decisions_of(recipe(pitfall))) is BROKEN[pitfall]
        with pytest.raises(ValueError, match="leave reduce canonical out"):
            recipe(pitfall, reduce="canonical")
    with pytest.raises(ValueError, match="no pitfall is called 'decay-on-batchnrm'; expected decay-on-batchnorm"):
        recipe("decay-on-batchnrm")


GROWING: dict[str, Any] = {"base_minibatch": 4, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def right_run(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tiny.recipe(**GROWING), out=tmp_path_factory.mktemp("right") / "run").summary


@pytest.mark.parametrize("pitfall", ["momentum-inside-uncorrected", "overlapping-shards", "batchnorm-stats-k-times"])
def test_a_run_with_a_pitfall_learns_something_else_and_goes_on_where_it_was_stopped(
    tiny: ModuleType, right_run: dict[str, Any], tmp_path: Path, pitfall: str
):
    broken = tiny.recipe(**GROWING, pitfall=pitfall)
    whole = train(broken, out=tmp_path / "whole").summary
    assert whole["weights_sha256"] != right_run["weights_sha256"]
    calls = iter(range(100))
    with pytest.raises(StoppedError):
        train(broken, out=tmp_path / "run", stop_asked=lambda: next(calls) == 8)
    with pytest.raises(ValueError, match=f"is a run of another recipe .pitfall: {pitfall} → None.; choose another"):
        train(tiny.recipe(**GROWING), out=tmp_path / "run")
    assert train(broken, out=tmp_path / "run").summary["state_sha256"] == whole["state_sha256"]


RATES = [0.1, 0.1, 0.25, 0.4, 0.04, 0.04, 0.3]
FORMS = pytest.mark.parametrize("nesterov", [True, False])


def trajectory(
    kind: type[Any], rates: list[float], change: Callable[[Any, float], None], *, nesterov: bool
) -> list[Tensor]:
    """The weights after each step on a fixed sequence of gradients."""
    draw = torch.Generator().manual_seed(0)
    weights = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
    optimizer, seen = kind(groups, lr=RATES[0], momentum=0.9, nesterov=nesterov), []
    for rate in rates:
        change(optimizer, rate)
        for weight in weights:
            weight.grad = torch.randn(3, generator=draw, dtype=torch.float64)
        optimizer.step()
        seen.append(torch.cat([weight.detach().clone() for weight in weights]))
    return seen


def only_set(optimizer: Any, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@FORMS
@pytest.mark.parametrize("change", [correct_momentum, lambda o, rate: set_rate(o, rate, {"momentum_buffer"})])
def test_corrected_at_every_change_of_the_rate_it_is_torchs(change: Callable[[Any, float], None], nesterov: bool):
    found = trajectory(InsideSGD, RATES, change, nesterov=nesterov)
    exact(found, trajectory(SGD, RATES, only_set, nesterov=nesterov))


@FORMS
def test_uncorrected_the_velocity_keeps_the_old_rates_share(nesterov: bool):
    found = trajectory(InsideSGD, RATES, only_set, nesterov=nesterov)
    expected = trajectory(SGD, RATES, only_set, nesterov=nesterov)
    exact(found[:2], expected[:2])
    assert (found[2] - expected[2]).abs().max() > 1e-2
    # w' = w − v' without a gradient: v' = m·v, whatever the rate has become (form A would move by m·v·η'/η).
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = InsideSGD([weight], lr=0.5, momentum=0.9, nesterov=nesterov)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before, velocity = weight.item(), 0.5
    only_set(optimizer, 5.0)
    weight.grad.zero_()
    optimizer.step()
    assert weight.item() - before == pytest.approx(-(0.9 * velocity) * (0.9 if nesterov else 1), abs=1e-12)


@FORMS
@pytest.mark.parametrize("steps", [0, 1])
def test_the_probe_says_form_b_before_and_after_a_step(nesterov: bool, steps: int):
    weight = torch.ones(3, requires_grad=True)
    optimizer = InsideSGD([weight], lr=0.1, momentum=0.9, nesterov=nesterov)
    weight.grad = torch.ones(3)
    for _ in range(steps):
        optimizer.step()
    state = {key: value.clone() for key, value in optimizer.state[weight].items()}
    assert momentum_form(optimizer) == "inside"
    assert velocity_inside(optimizer) == {"momentum_buffer"}
    assert {key: value.tolist() for key, value in optimizer.state[weight].items()} == {
        key: value.tolist() for key, value in state.items()
    }


def test_a_weight_without_a_gradient_stays_and_its_velocity_with_it():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = InsideSGD(weights, lr=0.1, momentum=0.9)
    for weight in weights:
        weight.grad = torch.ones(2)
    optimizer.step()
    weights[1].grad = None
    before, velocity = weights[1].detach().clone(), optimizer.state[weights[1]]["momentum_buffer"].clone()
    optimizer.step()
    assert torch.equal(weights[1].detach(), before)
    assert torch.equal(optimizer.state[weights[1]]["momentum_buffer"], velocity)
    assert (weights[0] < before).all()

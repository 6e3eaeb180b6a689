"""One iteration (eq 2, §3): a sum over passes divided once by kn, masked where anything is not finite."""

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from steps import step_of
from torch import Tensor, nn
from torch.nn import functional as F
from wires import on_threads

from onehour import Recipe
from onehour.data.loader import Batch, Skipped
from onehour.dist.devices import Launch
from onehour.dist.group import Group
from onehour.dist.placement import passes
from onehour.rules.batchnorm import convert_batchnorm
from onehour.training.build import build_optimizer
from onehour.training.checkpoint import Checkpoints
from onehour.training.feeds import pick_share
from onehour.training.state import Network, digest_of, model_state, optimizer_state
from onehour.training.step import Step

N = 2  # n; k = 3 workers of them


def make(
    model: nn.Module, *, together: int = 1, options: dict[str, Any] | None = None, **changes: Any
) -> tuple[Step, Recipe]:
    common: dict[str, Any] = {"minibatch": 6, "per_worker": N, "base_minibatch": 6, "base_lr": 0.5, "samples": 60}
    common |= {"warmup": "none", "precision": "float64", "weight_decay": 0.0}
    recipe = Recipe(**(common | changes))
    model = convert_batchnorm(model, N).double().train()
    return step_of(recipe, model, passes(range(3), together), **(options or {})), recipe


def batches(images: Tensor, labels: Tensor, together: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """The passes of one minibatch, whose rows belong to the workers in turn."""
    for workers in passes(range(3), together):
        rows = [row * 3 + worker for row in range(N) for worker in workers]
        yield images[rows], labels[rows]


class Marked(nn.Module):
    """Logits that are a bias, and `extra` with it where the first image of a pass is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))
        self.extra = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.bias + (self.extra if images[0, 0] == 9 else 0) + 0 * images


class Rooted(nn.Module):
    """A finite output, √0 = 0, whose gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.root = nn.Parameter(torch.zeros(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) + self.root.sqrt()


LABELS = torch.tensor([0, 1, 2, 0, 1, 1])


@pytest.mark.parametrize("together", [1, 2, 3])
def test_the_gradient_is_the_sum_over_the_samples_divided_once_by_kn(together: int):
    step, _ = make(Marked(), together=together)
    found = step(0, batches(torch.zeros(6, 3).double(), LABELS, together))
    # Softmax of zeros is 1/3 for each class; labels 0, 1 and 2 occur 2, 3 and 1 times.
    expected = torch.tensor([6 / 3 - 2, 6 / 3 - 3, 6 / 3 - 1], dtype=torch.float64) / 6
    bias = step.model.get_parameter("bias")
    torch.testing.assert_close(bias.grad, expected, rtol=0, atol=1e-12)
    # Nesterov's first step: rate · (1 + m) · gradient.
    torch.testing.assert_close(bias.detach(), -0.5 * 1.9 * expected, rtol=0, atol=1e-12)
    assert found.sums[:, 0].tolist() == pytest.approx([math.log(3), 4], abs=1e-12)  # argmax of zeros is 0


def clipped(clip: Callable[[nn.Module, Tensor], None]) -> list[Tensor]:
    """The weights after 20 updates of plain SGD, whose gradients `clip` makes."""
    model = curved()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    for images in IMAGES:
        clip(model, images)
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def curved() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()


IMAGES = torch.randn(20, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NORM = 0.3


def test_the_norm_that_is_cut_is_of_the_mean_over_the_whole_minibatch():
    def whole(model: nn.Module, images: Tensor) -> None:
        model.zero_grad()
        F.cross_entropy(model(images), LABELS).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), NORM)))

    def each_worker(model: nn.Module, images: Tensor) -> None:
        gradients = [torch.zeros_like(parameter) for parameter in model.parameters()]
        for own, labels in batches(images, LABELS):
            model.zero_grad()
            F.cross_entropy(model(own), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), NORM)
            for total, parameter in zip(gradients, model.parameters(), strict=True):
                assert parameter.grad is not None
                total += parameter.grad / 3
        for total, parameter in zip(gradients, model.parameters(), strict=True):
            parameter.grad = total

    norms: list[float] = []
    step, _ = make(curved(), together=2, clip_norm=NORM)
    for iteration, images in enumerate(IMAGES):
        step(iteration, batches(images, LABELS, 2))
    expected, wrong = clipped(whole), clipped(each_worker)
    assert min(norms) < NORM < max(norms)
    for mine, right, other in zip(step.model.parameters(), expected, wrong, strict=True):
        torch.testing.assert_close(mine.detach(), right, rtol=0, atol=1e-12)
        assert (mine - other).abs().max() > 1e-3


class Steep(Marked):
    """Whose gradient is finite, and its square is not."""

    def forward(self, images: Tensor) -> Tensor:
        return 1e200 * self.bias + 0 * images


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_norm_that_overflows_masks_the_update(clip_norm: float | None):
    step, _ = make(Steep(), clip_norm=clip_norm)
    found = step(0, batches(torch.zeros(6, 3).double(), LABELS))
    assert found.alive.tolist() == [clip_norm is None]
    assert bool(step.model.get_parameter("bias").any()) == (clip_norm is None)


def test_every_process_cuts_by_the_norm_of_process_0(monkeypatch: pytest.MonkeyPatch):
    """As on hosts with other processors, or threads, whose sums have other bits."""
    norms, calls = torch._foreach_norm, iter(range(99))  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(torch, "_foreach_norm", lambda given: [n * (1 + 1e-6 * next(calls)) for n in norms(given)])

    def act(group: Group) -> list[Tensor]:
        recipe = Recipe(samples=60, minibatch=6, per_worker=2, base_minibatch=6, clip_norm=1e-3)
        own = passes(pick_share(recipe, group), 1)
        model = nn.Linear(3, 3, bias=False)
        nn.init.eye_(model.weight)
        step = step_of(recipe, model, own, group=group)
        for iteration, images in enumerate(IMAGES[:3].float()):
            whole = list(batches(images, LABELS))
            step(iteration, iter([whole[workers.start] for workers in own]))
        return [parameter.detach() for parameter in model.parameters()]

    first, *others = on_threads(monkeypatch, 3, act)
    for other in others:
        assert all(map(torch.equal, first, other))


def test_a_parameter_that_one_worker_used_has_that_workers_sum_over_kn():
    step, _ = make(Marked(), weight_decay=0.1)
    images = torch.zeros(6, 3).double()
    images[1, 0] = 9  # the first image of worker 1, whose labels are 1 and 1
    step(0, batches(images, LABELS))
    expected = torch.tensor([2 / 3, 2 / 3 - 2, 2 / 3], dtype=torch.float64) / 6
    extra = step.model.get_parameter("extra")
    torch.testing.assert_close(extra.grad, expected, rtol=0, atol=1e-12)


def test_a_parameter_that_no_worker_used_is_neither_decayed_nor_moved_by_its_velocity():
    step, _ = make(Marked(), weight_decay=0.1)
    extra = step.model.get_parameter("extra")
    marked = torch.zeros(6, 3).double()
    marked[:, 0] = 9
    step(0, batches(marked, LABELS))
    moved = extra.detach().clone()
    velocity = step.optimizer.state[extra]["momentum_buffer"].clone()
    assert moved.abs().max() > 0.1
    step(1, batches(torch.zeros(6, 3).double(), LABELS))
    assert torch.equal(extra.detach(), moved)
    assert torch.equal(step.optimizer.state[extra]["momentum_buffer"], velocity)
    step(2, batches(marked, LABELS))  # and it moves again when it is used again
    assert not torch.equal(extra.detach(), moved)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("bad", ["infinite image", "nan image", "gradient alone"])
def test_what_is_not_finite_masks_the_update_and_all_later_ones(tiny: ModuleType, optimizer: str, bad: str):
    torch.manual_seed(0)
    model = Rooted() if bad == "gradient alone" else nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    if bad == "gradient alone":
        nn.init.ones_(model.get_parameter("root"))
    step, _ = make(model, optimizer=optimizer, weight_decay=0.1)

    def state() -> str:
        return digest_of(model_state(step.model), optimizer_state(step.optimizer, step.model))

    good = torch.randn(6, 3).double()
    assert step(0, batches(good, LABELS)).alive.tolist() == [True]
    if bad == "gradient alone":
        step.model.get_parameter("root").data.zero_()
    before = state()
    images = good.clone()
    if bad != "gradient alone":
        images[4] = torch.inf if bad == "infinite image" else torch.nan
    found = step(1, batches(images, LABELS))
    assert found.alive.tolist() == [False]
    assert math.isfinite(found.sums[0, 0]) == (bad == "gradient alone")
    assert state() == before
    assert step(2, batches(good, LABELS)).alive.tolist() == [False]
    assert state() == before


def test_a_stop_that_was_asked_for_is_in_the_vector_and_goes_with_the_next_iteration():
    step, _ = make(Marked())
    images = torch.zeros(6, 3).double()
    assert step(0, batches(images, LABELS), stopping=True).stop == 1
    assert step(1, batches(images, LABELS)).stop == 0


def test_the_rate_is_the_schedules_at_the_iterations_first_sample():
    step, recipe = make(Marked(), warmup="gradual", base_minibatch=3, warmup_epochs=1, epochs=2)
    for iteration in (0, 1, 4):
        step(iteration, batches(torch.zeros(6, 3).double(), LABELS))
        rates = {group["lr"] for group in step.optimizer.param_groups}
        assert rates == {recipe.schedule(iteration * 6 / 60)}
        assert rates.pop() == pytest.approx(0.5 + 0.5 * iteration / 10)


def replaying(launch: Launch, **options: Any) -> Callable[..., Tensor]:
    """As a CUDA graph runs it: always on the same tensors, which are filled before."""
    rate, stopping, kept = torch.zeros(()), torch.zeros(()), list[Batch]()

    def run(batches: Iterator[Batch], now: float, stop: bool) -> Tensor:
        given = list(batches)
        kept.extend((images.clone(), labels.clone()) for images, labels in given[len(kept) :])
        for mine, its in zip(chain(*kept), chain(*given), strict=True):
            mine.copy_(its)
        rate.fill_(now)
        stopping.fill_(stop)
        return launch(kept, rate, stopping)

    return run


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_launch_reads_all_that_differs_between_iterations_from_where_it_lies(
    monkeypatch: pytest.MonkeyPatch, optimizer: str
):
    weights: list[Tensor] = []
    for captured in (False, True):
        monkeypatch.setattr(Step, "_can_be_captured", lambda step, captured=captured: captured)
        monkeypatch.setattr("onehour.training.step.CapturedIteration", replaying)
        recipe: dict[str, Any] = {"optimizer": optimizer, "scaling": "sqrt", "warmup": "gradual", "base_minibatch": 3}
        step, _ = make(Marked(), weight_decay=0.1, warmup_epochs=1, epochs=2, **recipe)
        for iteration in range(4):
            images = torch.zeros(6, 3).double()
            images[:, 0] = 9 * (torch.arange(6) % (iteration + 2) == 0)
            found = step(iteration, batches(images, LABELS.roll(iteration)), stopping=iteration == 2)
            assert found.stop == (iteration == 2)
        weights.append(torch.cat([parameter.detach() for parameter in step.model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)  # the rate in the tensor is a float32


def test_a_writer_that_is_late_writes_the_velocity_as_it_was_before_the_next_rate(tmp_path: Path):
    recipe = {"optimizer": "onehour.rules.momentum:InsideSGD", "warmup": "gradual", "base_minibatch": 3}
    _, made = make(Marked(), **recipe)
    checkpoints = Checkpoints(tmp_path, made, Group(), warn=print)
    step, _ = make(Marked(), **recipe)
    images, late = torch.zeros(6, 3).double(), threading.Event()
    step(0, batches(images, LABELS))
    before = digest_of(optimizer_state(step.optimizer, step.model))
    progress = {"iteration": 1, "position": 6, "totals": [0.1, 2.0], "build": {}}

    def wait() -> None:
        assert late.wait(300)

    checkpoints.save(step.network, progress, first=wait)
    step(1, batches(images, LABELS))
    late.set()
    checkpoints.close()
    other, _ = make(Marked(), **recipe)
    checkpoints.load(other.network)
    assert digest_of(optimizer_state(other.optimizer, other.model)) == before


@pytest.mark.parametrize("captured", [False, True])
def test_an_update_waits_until_what_it_changes_is_copied(monkeypatch: pytest.MonkeyPatch, captured: bool):
    asked, finish, in_time = threading.Event(), Network.finish_copy, list[bool]()

    def finished(network: Network) -> None:
        asked.set()
        finish(network)

    def graph(launch: Launch, **_: Any) -> Callable[..., Tensor]:
        def replay(given: list[Batch], rate: float, stopping: float) -> Tensor:
            in_time.append(asked.is_set())  # nothing within it can wait
            return launch(given, torch.tensor(rate), torch.tensor(float(stopping)))

        return replay

    monkeypatch.setattr(Network, "finish_copy", finished)
    monkeypatch.setattr(Step, "_can_be_captured", lambda _: captured)
    monkeypatch.setattr("onehour.training.step.CapturedIteration", graph)
    step, _ = make(Marked())
    images = torch.zeros(6, 3).double()
    step(0, batches(images, LABELS))
    before = digest_of(*step.network.state())
    asked.clear()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asked.wait, 30)
        _, copies = step.network.begin_copy(thread)
        step(1, batches(images, LABELS))
    assert digest_of(*copies) == before
    assert in_time == [True] * 2 * captured


def test_statistics_move_once_an_iteration_however_many_passes_it_takes():
    torch.manual_seed(0)
    images = torch.randn(6, 3).double()
    after = []
    for together in (1, 2, 3):
        step, _ = make(nn.Sequential(nn.BatchNorm1d(3)), together=together)
        step(0, batches(images, LABELS, together))
        after.append(step.model.state_dict())
    for name in ("0.running_mean", "0.running_var"):
        for state in after[1:]:
            torch.testing.assert_close(state[name], after[0][name], rtol=0, atol=1e-12)
    workers = [images[worker::3] for worker in range(3)]
    variance = torch.stack([w.var(0) for w in workers]).mean(0)
    torch.testing.assert_close(after[0]["0.running_var"], 0.9 + 0.1 * variance, rtol=0, atol=1e-12)
    assert [int(state["0.num_batches_tracked"]) for state in after] == [1, 1, 1]


def test_random_layers_are_keyed_by_iteration_and_worker():
    class Recording(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.drawn = nn.Parameter(torch.zeros(3)), []

        def forward(self, images: Tensor) -> Tensor:
            self.drawn.append(torch.rand(1).item())
            return self.bias + 0 * images

    drawn = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        model = Recording()
        step, _ = make(model)
        for iteration in (0, 1):
            step(iteration, batches(torch.zeros(6, 3).double(), LABELS))
        drawn.append(model.drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 6


class Noisy(torch.optim.SGD):
    """Adds random numbers to the weights, as Langevin dynamics does."""

    def step(self, closure: Any = None) -> Any:
        for weight in (p for group in self.param_groups for p in group["params"]):
            weight.grad.add_(torch.randn_like(weight), alpha=1e-3)
        return super().step(closure)


def test_an_optimizer_draws_the_same_numbers_whatever_passes_its_process_took():
    found = []
    for together in (1, 3):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizer = Noisy(model.parameters(), lr=0.5)
        step, _ = make(model, together=together, options={"optimizer": optimizer}, optimizer="mine:Noisy")
        step(0, batches(torch.ones(6, 3), LABELS, together))
        found.append(model.weight)
    assert torch.allclose(*found, rtol=0, atol=1e-12)


K = 6


def counted(group: Group, **reduction: Any) -> list[list[float]]:
    """Two iterations in which worker j replaces j images and gets j + 1 of its 7 labels wrong."""
    recipe = Recipe(samples=1000, minibatch=7 * K, per_worker=7, base_minibatch=7 * K, bad_images="skip", **reduction)
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    own = passes(pick_share(recipe, group), recipe.together if recipe.reduce == "canonical" else 2)
    optimizer = build_optimizer(recipe.replace(base_lr=1e-30), model)
    skipped = Skipped()
    step = step_of(recipe, model, own, group=group, optimizer=optimizer, replaced=skipped)

    def batches() -> Iterator[Batch]:
        for workers in own * 2:
            skipped.add(list(range(sum(workers))))
            wrong = torch.tensor([row <= j for j in workers for row in range(7)])
            yield torch.eye(2)[wrong.long()], torch.zeros(len(wrong), dtype=torch.int64)

    given = batches()
    found = [step(iteration, given, stopping=stopping) for iteration, stopping in enumerate((group.rank == 0, False))]
    return [[float(one.sums[1, 0]), float(one.stop), float(one.skipped)] for one in found]


@pytest.mark.parametrize(
    "reduction", [{}, {"reduce": "canonical"}, {"reduce": "canonical", "canonical_pass": 2}], ids=str
)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_errors_replaced_images_and_stops_are_counted_once(
    monkeypatch: pytest.MonkeyPatch, reduction: dict[str, Any], processes: int
):
    for found in on_threads(monkeypatch, processes, lambda group: counted(group, **reduction)):
        # 1 + 2 + … + 6 errors, 0 + 1 + … + 5 images.
        assert found == [[21, 1, 15], [21, 0, 15]]

"""What the observers write down of data and schedules, against loops whose numbers are known."""

import random
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from observing import Watched, events, scalar
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from onehour.check.observe import passes
from onehour.check.observe.digests import random_states, seeded
from onehour.check.observe.passes import EnumeratedSampler, cut_to, following_enumerate
from onehour.check.observe.scheduler import curve, runs_of
from onehour.check.story import Story
from onehour.check.tape import (
    BatchGiven,
    EpochBegan,
    EpochEnded,
    GroupJoined,
    LoaderSeen,
    OptimizerStep,
    SchedulerMade,
    SchedulerStep,
)


def test_orders_of_epochs_are_enumerated_in_full():
    data = TensorDataset(torch.arange(10.0))
    with Watched(cut=True) as tape:
        loader = DataLoader(data, batch_size=4, shuffle=True)
        taken = [[batch.tolist() for (batch,) in loader] for _ in range(3)]
    first, second, _ = (event.order for event in events(tape, EpochBegan))
    assert first is not None
    assert second is not None
    assert (first.count, first.unique, first.largest) == (10, 10, 4)
    assert first.members == second.members
    assert first.digest != second.digest
    for epoch in range(2):
        order = Story(tape).order(0, epoch)
        assert order is not None
        assert list(order) == [int(x) for batch in taken[epoch] for x in batch]
    assert Story(tape).order(0, 2) is None
    assert [event.size for event in events(tape, BatchGiven)] == [4, 4, 2] * 3
    (seen,) = events(tape, LoaderSeen)
    assert (seen.samples, seen.batches) == (10, 3)


def test_the_numbers_that_a_loop_draws_stay_the_same():
    data = TensorDataset(torch.arange(12.0))

    def draw(watched: bool) -> list[Any]:
        torch.manual_seed(3)
        loader = DataLoader(data, batch_size=4, shuffle=True)
        drawn = []
        for _ in range(2):
            for (batch,) in loader:
                drawn += [batch.tolist(), float(torch.rand(()))]
        return drawn

    plain = draw(False)
    with Watched():
        assert draw(True) == plain


def test_what_is_drawn_from_a_seed_leaves_no_trace():
    def draw() -> tuple[float, float, float]:
        with seeded(1):
            return float(torch.rand(())), random.random(), float(numpy.random.rand())

    before = random_states()
    assert draw() == draw()
    assert random_states() == before


def test_a_sampler_without_end_is_not_waited_for():
    class Endless:
        def __iter__(self) -> Any:
            index = 0
            while True:
                yield [index % 4]
                index += 1

        def __len__(self) -> int:
            return 3

    seen: list[Any] = []
    sampler = EnumeratedSampler(Endless())
    sampler.drawn = seen.append
    iterator = iter(sampler)
    assert [next(iterator) for _ in range(5)] == [[0], [1], [2], [3], [0]]
    assert seen == [[[0], [1], [2]]]
    assert len(sampler) == 3


def test_a_long_pass_leaps_to_its_last_windows():
    common: dict[str, Any] = {"total": 1000, "seconds": 100.0}
    assert cut_to(at=3, taken=3, updates=3, **common) is None  # too early
    assert cut_to(at=4, taken=4, updates=4, **common) == 998
    assert cut_to(at=16, taken=16, updates=4, **common) == 992  # two windows of 4
    assert cut_to(at=16, taken=16, updates=4, total=1003, seconds=100.0) == 996  # a window, and the rest of 3
    assert (996 - 16) % 4 == 0
    assert cut_to(at=17, taken=17, updates=4, **common) is None  # within a window
    assert cut_to(at=4, taken=4, updates=None, **common) == 998  # an evaluation
    assert cut_to(at=999, taken=999, updates=None, **common) is None  # which is over
    assert cut_to(at=16, taken=16, updates=4, total=1000, seconds=0.01) is None  # fast enough
    assert cut_to(at=4, taken=4, updates=4, total=48, seconds=100.0) is None  # short enough
    assert cut_to(at=16, taken=16, updates=4, total=None, seconds=100.0) is None


def test_a_cut_pass_gives_true_indices_and_a_true_length(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(passes, "cut_to", lambda **now: 96 if now["at"] == 4 and now["updates"] else None)
    model = scalar()
    with Watched(cut=True) as tape:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loader = DataLoader(TensorDataset(torch.arange(100.0, dtype=torch.float64)), batch_size=1, num_workers=2)
        seen = []
        for _ in range(2):
            for i, (batch,) in following_enumerate(loader):
                seen.append((i, int(batch)))
                optimizer.zero_grad()
                model(batch.view(1, 1)).sum().backward()
                optimizer.step()
        assert len(loader) == 100
    assert seen == 2 * [(i, i) for i in (0, 1, 2, 3, 96, 97, 98, 99)]
    ends = events(tape, EpochEnded)
    assert ends == [EpochEnded(epoch=epoch, cut=True, batches=100, samples=100) for epoch in range(2)]


def test_an_iterable_data_set_has_no_order():
    class Stream(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.arange(6.0).split(1))

    with Watched() as tape:
        assert [batch.numel() for batch in DataLoader(Stream(), batch_size=2)] == [2, 2, 2]
    (event,) = events(tape, EpochBegan)
    assert event.order is None
    assert events(tape, LoaderSeen)[0].samples is None


def test_scheduler_steps_are_the_loop_s_own():
    with Watched() as tape:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        parts: list[Any] = [lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2), lr_scheduler.StepLR(optimizer, 2)]
        scheduler = lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])
        for _ in range(4):
            optimizer.step()
            scheduler.step()
    made = events(tape, SchedulerMade)
    assert [event.name for event in made] == ["LinearLR", "StepLR", "SequentialLR"]
    assert made[2].parts == [0, 1]
    assert [event.scheduler for event in events(tape, SchedulerStep)] == [2] * 4


def test_schedulers_of_ones_own_are_seen_too():
    with Watched() as tape:

        class Mine(lr_scheduler.LRScheduler):
            def get_lr(self) -> list[Any]:
                return [0.5]

            def step(self, epoch: int | None = None) -> None:
                super().step(epoch)

        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        scheduler = Mine(optimizer)
        optimizer.step()
        scheduler.step()
    assert [event.name for event in events(tape, SchedulerMade)] == ["Mine"]
    assert len(events(tape, SchedulerStep)) == 1


def test_the_curve_of_a_copy_is_the_scheduler_s():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=5)
    assert len(curve(scheduler, 100)) == 6  # it refuses to go on
    power = lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / 10) ** 0.9)
    assert len(curve(power, 100)) == 11  # complex behind its end
    assert runs_of([1.0, 1.0, 0.5, 1.0]) == [[2, 1.0], [1, 0.5], [1, 1.0]]
    long = [float(i) for i in range(100_000)]
    pairs = runs_of(long)
    assert len(pairs) < 5000
    assert sum(count for count, _ in pairs) == len(long)
    assert pairs[:1000] == [[1, rate] for rate in long[:1000]]


def test_a_scheduler_of_a_wrapped_optimizer_is_the_optimizer_s():
    class Wrapper(torch.optim.Optimizer):
        """As Accelerate's: an optimizer in name."""

        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        @property
        def param_groups(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
            return self.optimizer.param_groups

        @property
        def defaults(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
            return self.optimizer.defaults

        def step(self, closure: Any = None) -> Any:
            self.optimizer.step()

    with Watched() as tape:
        inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        wrapper = Wrapper(inner)
        scheduler = lr_scheduler.StepLR(wrapper, step_size=1)
        for _ in range(2):
            wrapper.step()
            scheduler.step()
    (made,) = events(tape, SchedulerMade)
    assert made.optimizer == events(tape, OptimizerStep)[0].optimizer == 0
    assert [event.scheduler for event in events(tape, SchedulerStep)] == [made.scheduler] * 2


@pytest.mark.parametrize(
    ("arguments", "options"), [(("nccl", "env://"), {}), (("nccl",), {}), ((), {"backend": "nccl"})]
)
def test_gloo_stands_in_for_nccl_however_it_is_named(
    arguments: tuple[str, ...], options: dict[str, str], port: int, monkeypatch: pytest.MonkeyPatch
):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Watched(cut=True) as tape:
        dist.init_process_group(*arguments, **options)  # pyright: ignore[reportArgumentType]
        assert dist.get_backend() == "gloo"
        dist.destroy_process_group()
    assert len(events(tape, GroupJoined)) == 1

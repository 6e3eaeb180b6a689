"""Weights of samples, steps and cleared gradients judged from recorded numbers alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from onehour.check.case import Base, Case
from onehour.check.pitfalls import judge
from onehour.check.pitfalls.gradient import factor, weights
from onehour.check.story import Story
from onehour.check.tape import (
    BackwardPass,
    BatchGiven,
    EpochBegan,
    EpochEnded,
    LoaderSeen,
    LossTerm,
    OptimizerSeen,
    OptimizerStep,
    ParameterGroup,
    Tape,
)


def term(total: float, count: float = 8, **changes: Any) -> LossTerm:
    low = high = total / count
    return replace(LossTerm("cross_entropy", "t.py:3", "mean", count, total, low, high), **changes)


class Loop:
    """Writes a tape as a loop would; gradients are one number."""

    def __init__(self) -> None:
        self.tape, self.index, self.gathered, self.left = Tape(), 0, 0.0, [0.0]
        groups = [ParameterGroup(parameters=1)]
        kind = {"form": "outside", "velocity": [], "adaptive": False, "decay": []}
        self.tape.add(OptimizerSeen("t.py:1", optimizer=0, groups=groups, **kind))
        self.tape.add(LoaderSeen("t.py:2", loader=0, samples=64, batches=8, batch_size=8, drop_last=False))
        self.epoch(0)

    def epoch(self, number: int, **ended: Any) -> None:
        if number:
            self.tape.add(EpochEnded(loader=0, epoch=number - 1, **ended))
        self.number, self.index = number, 0
        self.tape.add(EpochBegan("t.py:2", loader=0, epoch=number, batches=8, planned=None))

    def backward(
        self,
        *terms: LossTerm,
        size: int = 8,
        scale: float = 1.0,
        cleared: bool = False,
        loader: int = 0,
        finite: bool = True,
    ) -> None:
        if cleared:
            self.gathered = 0.0
        own = sum(t.total for t in terms) * scale * (1 + self.index) * finite
        self.tape.add(BatchGiven(loader=loader, epoch=self.number, index=self.index, size=size))
        self.tape.add(
            BackwardPass("t.py:4", terms=list(terms), samples=size, scale=scale,
            before={"0": [self.gathered]}, local={"0": [own]},
        ))  # fmt: skip
        self.gathered += own
        self.index += 1

    def step(self, *, clear: bool = True, times: float = 1.0) -> None:
        self.tape.add(
            OptimizerStep("t.py:5", optimizer=0, rates=[0.1], closure=False, with_gradient=1, parameters=1,
            final=[self.gathered * times], left=[self.gathered * times], moved=[1.0],
        ))  # fmt: skip
        self.gathered = 0.0 if clear else self.gathered * times

    def ids(self) -> list[str]:
        return [finding.pitfall for finding in judge(Case([Story(self.tape)]))]


Step = Callable[[Loop], None]


def b(total: float, count: int = 8, **options: Any) -> Step:
    """A backward pass over a batch."""
    return lambda loop: loop.backward(term(total, count), size=count, **options)


def mixed(total: float, *lambdas: float, count: int = 8) -> list[Step]:
    """Mixup: two losses of one line, whose weights are divided anew for each batch."""
    parts = [(total * share, total * (1 - share)) for share in lambdas]
    return [lambda loop, pair=pair: loop.backward(*[term(t, count) for t in pair], size=count) for pair in parts]


def aux(main: float, auxiliary: float, *, main_first: bool = True) -> Step:
    """An auxiliary loss beside the main one; the backward pass comes to the later one first."""
    terms = term(auxiliary, where="t.py:7"), term(main)
    return lambda loop: loop.backward(*(terms if main_first else reversed(terms)))


def focal(*totals: float) -> list[Step]:
    """A loss whose weights depend on the samples."""
    terms = [term(total, reduction="none", low=0.0, high=total) for total in totals]
    return [lambda loop, own=own: loop.backward(own) for own in terms]


def kl(total: float, count: int = 8) -> Step:
    """The same through a distillation, whose loss is multiplied by its temperature's square."""
    distilled = term(total, count, name="kl_div", where="t.py:6", reduction="batchmean")
    return lambda loop: loop.backward(distilled, size=count)


def s(**options: Any) -> Step:
    """A step of the optimizer."""
    return lambda loop: loop.step(**options)


def e(number: int, **ended: Any) -> Step:
    """An epoch begins."""
    return lambda loop: loop.epoch(number, **ended)


LOOPS: dict[str, tuple[list[Step], list[str]]] = {
    "one batch an update": (4 * [b(1.0), s()], []),
    "four, divided in the loss": (2 * [*4 * [b(0.25)], s()], []),
    "four, not divided": (2 * [*4 * [b(1.0)], s()], ["accumulation-not-divided"]),
    "four, divided in the gradients": (2 * [*4 * [b(1.0)], s(times=0.25)], []),
    "a short last window, divided by the usual count": (
        [*4 * [b(0.25)], s(), *2 * [b(0.25)], s(), e(1), *4 * [b(0.25)], s(), *2 * [b(0.25)], s()],
        ["accumulation-tail"],
    ),
    "a last window of one batch, divided by the usual count": (
        2 * [*2 * [*2 * [b(0.5)], s()], b(0.5), s()],
        ["accumulation-tail"],
    ),
    "a short last window, divided by its own": (
        [*4 * [b(0.25)], s(), *2 * [b(0.5)], s(), e(1), *4 * [b(0.25)], s(), *2 * [b(0.5)], s()],
        [],
    ),
    "a last window that is thrown away": (
        [*4 * [b(0.25)], s(), *2 * [b(0.25)], e(1), b(0.25, cleared=True), *3 * [b(0.25)], s(), *2 * [b(0.25)]],
        ["accumulation-tail"],
    ),
    "a cut before it that nobody followed": (
        [
            *2 * [*4 * [b(0.25)], s()],
            *2 * [b(0.25)],
            e(1, cut=True, followed=False),
            *(b(0.25, cleared=True), *3 * [b(0.25)], s()),
        ],
        [],
    ),
    "steps that are skipped": (
        [*4 * [b(0.25)], *2 * [b(0.25, cleared=True), *3 * [b(0.25)]], s(), *2 * [*4 * [b(0.25)], s()]],
        [],
    ),
    "every second step is skipped": (
        [*2 * [*4 * [b(0.25)], b(0.25, cleared=True), *3 * [b(0.25)], s()], *4 * [b(0.25)], s()],
        [],
    ),
    "a step that is skipped at the end of an epoch": (
        [*2 * [*4 * [b(0.25)], s()], *4 * [b(0.25)], e(1), b(0.25, cleared=True), *3 * [b(0.25)], s()],
        [],
    ),
    "a tail's step that is skipped, as a gradient is not finite": (
        [*4 * [b(0.25)], s(), b(0.5), b(0.5, finite=False), e(1), b(0.25, cleared=True), *3 * [b(0.25)], s()],
        [],
    ),
    "a step that is skipped before a smaller batch": ([*2 * [b(1.0), s()], b(1.0), b(1.0, 2, cleared=True), s()], []),
    "a tail divided by the usual count, and a step that is skipped": (
        [*4 * [b(0.25)], b(0.25, cleared=True), *3 * [b(0.25)], s(), *2 * [*4 * [b(0.25)], s()], *2 * [b(0.25)], s()],
        ["accumulation-tail"],
    ),
    "windows that straddle epochs": (
        [*4 * [b(0.25)], s(), *2 * [b(0.25)], e(1), *2 * [b(0.25)], s(), *4 * [b(0.25)], s()],
        [],
    ),
    "what is not divided, with its tail": (
        [*2 * [*4 * [b(1.0)], s()], *2 * [b(1.0)], s()],
        ["accumulation-not-divided"],
    ),
    "means over unequal counts": (2 * [b(0.5), b(0.5, 2), s()], ["gradient-mean-of-unequal"]),
    "unequal counts, weighted": (2 * [b(0.8), b(0.2, 2), s()], []),
    "mixup, with its tail": (2 * [*mixed(0.25, 0.9, 0.2, 0.5, 0.7), s(), *mixed(0.5, 0.3, 0.95), s()], []),
    "mixup, and a tail divided by the usual count": (
        2 * [*mixed(0.25, 0.9, 0.2, 0.5, 0.7), s(), *mixed(0.25, 0.3, 0.95), s()],
        ["accumulation-tail"],
    ),
    "mixup, not divided": (2 * [*mixed(1.0, 0.9, 0.2, 0.5, 0.7), s()], ["accumulation-not-divided"]),
    "mixup in one of two batches": (2 * [*mixed(0.5, 0.9), b(0.5), s()], []),
    "mixup in one of two batches, not divided": (2 * [*mixed(1.0, 0.9), b(1.0), s()], ["accumulation-not-divided"]),
    "mixup over unequal counts": (
        2 * [*mixed(0.5, 0.9), *mixed(0.5, 0.3, count=2), s()],
        ["gradient-mean-of-unequal"],
    ),
    "a weight for each batch": (2 * [b(0.3), b(0.2), s(), b(0.45), b(0.1), s(), b(0.7), s()], []),
    "a weight for each batch, over unequal counts": (2 * [b(0.3), b(0.6, 2), s(), b(0.1), b(0.3, 2), s()], []),
    "a focal loss, with its tail": (2 * [*focal(0.2, 0.21), s(), *focal(0.17, 0.18), s(), *focal(0.4), s()], []),
    "an auxiliary loss": (2 * [*2 * [aux(0.5, 0.2)], s()], []),
    "an auxiliary loss, not divided": (2 * [*2 * [aux(1.0, 0.4)], s()], ["accumulation-not-divided"]),
    "an auxiliary loss of half the weight": (2 * [*2 * [aux(1.0, 0.5)], s()], ["accumulation-not-divided"]),
    "an auxiliary loss that comes first": (
        2 * [*2 * [aux(1.0, 0.4, main_first=False)], s()],
        ["accumulation-not-divided"],
    ),
    "two losses of one weight": (2 * [*2 * [aux(0.5, 0.5)], s()], []),
    "an auxiliary loss as strong as the batches are many": (2 * [*4 * [aux(0.25, 1.0)], s()], []),
    "a distillation at temperature 2, divided": (2 * [*4 * [kl(1.0)], s()], []),
    "a distillation whose temperature's square is the batch": (4 * [kl(8.0), s()], []),
    "two steps for a gradient": (4 * [b(1.0), s(clear=False), s()], ["double-step"]),
    "gradients that are never cleared": (4 * [b(1.0), s(clear=False)], ["step-without-zero-grad"]),
    "gradients that are cleared at every second step": (
        3 * [b(1.0), s(clear=False), b(1.0), s()],
        ["step-without-zero-grad"],
    ),
    "gradients that are cleared before the step": (4 * [b(1.0, cleared=True), s(times=0.0)], ["unused-gradients"]),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str):
    steps, expected = LOOPS[name]
    loop = Loop()
    for step in steps:
        step(loop)
    assert loop.ids() == expected


def test_a_grad_scaler_s_scale_is_taken_out():
    loop = Loop()
    for _ in range(2):
        for _ in range(2):
            loop.backward(term(0.5), scale=1024.0)
        loop.step(times=1 / 1024)
    assert loop.ids() == []
    update = Story(loop.tape).updates[0]
    assert factor(update) == pytest.approx(1.0)
    assert weights(update) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("size", "expected"), [(8, []), (4, ["accumulation-not-divided"])])
def test_two_losses_of_one_batch_are_no_accumulation_and_two_parts_of_it_are(size: int, expected: list[str]):
    loop = Loop()
    for _ in range(3):
        loop.tape.add(BatchGiven(loader=0, epoch=0, index=0, size=8))
        for _ in range(2):
            loop.tape.add(BackwardPass("t.py:4", terms=[term(1.0, count=size)], samples=size))
        loop.step()
    assert [[micro.samples for micro in update.microbatches] for update in Story(loop.tape).updates] == 3 * [
        [8] if size == 8 else [4, 4]
    ]
    assert loop.ids() == expected


def test_batches_that_are_taken_ahead_belong_to_their_own_passes():
    loop = Loop()
    for index in range(4):
        loop.tape.add(BatchGiven(loader=0, epoch=0, index=index, size=8 - index))
    for _ in range(4):
        loop.tape.add(BackwardPass("t.py:4", terms=[term(1.0)], samples=None))
        loop.step()
    assert [update.microbatches[0].index for update in Story(loop.tape).updates] == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [8, 4])
@pytest.mark.parametrize(("loader", "changes"), [(1, {}), (0, {"where": "t.py:7"}), (0, {"name": "mse_loss"})])
def test_a_batch_of_each_task_is_no_accumulation(loader: int, changes: dict[str, Any], count: int):
    """Two losses, each a mean over its own batch, with a backward pass each; one task may have fewer batches."""
    loop = Loop()
    for update in range(4):
        loop.backward(term(1.0))
        if update < 3:
            loop.backward(term(1.0, count=count, **changes), size=count, loader=loader)
        loop.step()
    assert loop.ids() == []


@pytest.mark.parametrize(("content", "expected"), [([1.0], []), (None, ["accumulation-not-divided"])])
def test_a_pass_for_each_task_over_one_input_without_a_loader(content: list[float] | None, expected: list[str]):
    tape = Tape()
    for _ in range(6):
        for _ in range(3):
            tape.add(BackwardPass("t.py:4", terms=[term(1.0)], samples=8, content=content))
        tape.add(OptimizerStep("t.py:5", optimizer=0, rates=[0.1]))
    assert [finding.pitfall for finding in judge(Case([Story(tape)]))] == expected


@pytest.mark.parametrize(("lying", "expected"), [([0.3, 0.6], ["step-without-zero-grad"]), ([0.6, 0.3], [])])
def test_gradients_that_are_clipped_before_the_next_backward_pass_are_kept(lying: list[float], expected: list[str]):
    tape = Tape()
    for _ in range(4):
        tape.add(BackwardPass(before={"0": lying}, local={"0": [1.0, 1.0]}))
        tape.add(OptimizerStep("t.py:5", left=[1.0, 2.0]))
    assert [finding.pitfall for finding in judge(Case([Story(tape)]))] == expected


def test_gradients_that_the_loop_puts_there_itself():
    """By torch.autograd.grad or torch.func: no backward pass, and a gradient of its own for each step."""
    loop = Loop()
    for update in range(4):
        loop.gathered = 1.0 + update
        loop.step(clear=False)
    assert loop.ids() == []
    loop = Loop()
    for update in range(4):
        loop.gathered = 1.0 + update
        loop.step(clear=False)
        loop.step()
    assert loop.ids() == ["double-step"]


def several(*loops: Loop, share: float) -> Case:
    """Processes whose steps take the sum of all gradients, times `share`."""
    for updates in zip(*[Story(loop.tape).updates for loop in loops], strict=True):
        total = sum(micro.backward.local["0"][0] for update in updates for micro in update.microbatches)
        for loop, update in zip(loops, updates, strict=True):
            events = loop.tape.events
            events[events.index(update.step)] = replace(update.step, final=[share * total])
    return Case([Story(loop.tape) for loop in loops])


@pytest.mark.parametrize(
    ("weight", "share", "expected"),
    [
        (1.0, 0.5, []),  # averaged means
        (1.0, 1.0, ["gradient-sum-not-mean"]),
        (2.0, 0.5, ["loss-scaled-by-world-size"]),
        (0.5, 1.0, []),  # the loss divided by p, and summed
    ],
)
@pytest.mark.parametrize("loss", [b, mixed, aux])
def test_gradients_of_two_processes(loss: Callable[..., Any], weight: float, share: float, expected: list[str]):
    loops = Loop(), Loop()
    for loop, lambdas in zip(loops, ((0.9, 0.2, 0.6), (0.3, 0.8, 0.5)), strict=True):
        for own in lambdas:
            step = {b: b(weight), mixed: mixed(weight, own)[0], aux: aux(weight, 0.4 * weight)}[loss]
            step(loop)
            loop.step()
    assert [finding.pitfall for finding in judge(several(*loops, share=share))] == expected


@pytest.mark.parametrize(("by", "expected"), [("own", ["gradient-mean-of-unequal"]), ("all", [])])
def test_each_process_divides_by_the_count_of_its_window(by: str, expected: list[str]):
    """Tokens: a batch's sum divided by those of its window, on this process or on all."""
    loops, counts = (Loop(), Loop()), ((8, 4), (3, 1))
    for loop, own in zip(loops, counts, strict=True):
        for _ in range(3):
            for count in own:
                divisor = sum(own) if by == "own" else sum(map(sum, counts)) / 2
                loop.backward(term(count / divisor, count, reduction="sum"))
            loop.step()
    assert [finding.pitfall for finding in judge(several(*loops, share=0.5))] == expected


def test_unequal_counts_on_two_processes():
    loops = Loop(), Loop()
    for loop, count in zip(loops, (8, 4), strict=True):
        for _ in range(3):
            loop.backward(term(1.0, count=count), size=count)
            loop.step()
    assert [finding.pitfall for finding in judge(several(*loops, share=0.5))] == ["gradient-mean-of-unequal"]


def test_steps_that_are_no_longer_looked_at_are_counted_too():
    loop = Loop()
    for update in range(8):
        loop.backward(term(1.0))
        loop.step(clear=False)
        loop.step()
        if update >= 3:
            steps = list(loop.tape.of(OptimizerStep))[-2:]
            loop.tape.events[-2:] = [replace(step, moved=None) for step in steps]
    (finding,) = judge(Case([Story(loop.tape)]))
    assert finding.measured == "16 steps on 8 gradients"


@pytest.mark.parametrize(("base", "expected"), [(None, True), (1e-4, True), (5e-5, False)])
def test_a_decay_that_was_multiplied_already(base: float | None, expected: bool):
    loop = Loop()
    groups = [ParameterGroup(weight_decay=1e-4, parameters=1)]
    loop.tape.events[0] = OptimizerSeen("t.py:1", groups=groups, adaptive=False, decay=[[1e-4, 1e-4]])
    for _ in range(4):
        loop.backward(term(1.0))
        loop.step()
    found = judge(Case([Story(loop.tape)], Base(0.05, 4, weight_decay=base)), only=["decay-decoupled-scales-with-lr"])
    assert bool(found) == expected
    assert all(finding.expected.startswith("0.0002 a step") for finding in found)


@pytest.mark.parametrize(("cleared", "expected"), [(True, []), (False, ["step-without-zero-grad"])])
def test_two_optimizers_that_clear_their_own_gradients(cleared: bool, expected: list[str]):
    """A GAN: the generator's pass gives the discriminator gradients too, which its own next window clears first."""
    tape, lying = Tape(), {"0": 0.0, "1": 0.0}

    def backward(given: dict[str, float]) -> None:
        before = {name: [number] for name, number in lying.items()}
        local = {name: [given.get(name, 0.0)] for name in lying}
        tape.add(BackwardPass("t.py:4", terms=[], samples=8, before=before, local=local))
        for name, number in given.items():
            lying[name] += number

    def step(name: str) -> None:
        final = [lying[name]]
        tape.add(
            OptimizerStep(f"t.py:{name}", optimizer=int(name), rates=[0.1], closure=False, final=final, left=final)
        )

    for update in range(1, 5):
        lying["0"] = 0.0 if cleared else lying["0"]
        backward({"0": 1.0 * update})
        backward({"0": 2.0 * update})
        step("0")
        lying["1"] = 0.0
        backward({"0": 3.0 * update, "1": 4.0 * update})
        step("1")
    found = judge(Case([Story(tape)]), only=["step-without-zero-grad"])
    assert [finding.pitfall for finding in found] == expected
    assert [finding.where for finding in found] == ["t.py:0"] * len(expected)

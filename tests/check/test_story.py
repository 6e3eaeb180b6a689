"""How a tape is read: which samples each backward pass took of its batch."""

import pytest

from onehour.check.story import Story
from onehour.check.tape import (
    BackwardPass,
    BatchGiven,
    EpochBegan,
    EpochEnded,
    LoaderSeen,
    LossTerm,
    OptimizerStep,
    Tape,
)


def term(count: int | None) -> LossTerm:
    return LossTerm("cross_entropy", "t.py:3", "mean", count, 1.0)


def taken(*passes: tuple[int | None, int | None], size: int | None = 64, steps: bool = False) -> list[list[int | None]]:
    """The samples of each window's passes, for three batches with these passes each: the model's, and the loss's."""
    tape = Tape()
    for index in range(3):
        tape.add(BatchGiven(loader=0, epoch=0, index=index, size=size))
        for number, (samples, count) in enumerate(passes):
            tape.add(BackwardPass(terms=[term(count)] if count else [], samples=samples))
            if steps or number == len(passes) - 1:
                tape.add(OptimizerStep(optimizer=0, rates=[0.1]))
    updates = Story(tape).updates
    return [[micro.samples for micro in update.microbatches] for update in updates[: len(updates) // 3]]


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ([(64, 64)], [64]),
        ([(20, 64)], [64]),  # time first: 20 steps
        ([(20, 20 * 64)], [64]),
        ([(16, 16 * 64)], [64]),
        ([(20, None)], [64]),  # a loss of one's own
        ([(20, 64), (20, 64)], [64]),  # two losses
        ([(32, 64), (32, 64)], [64]),
        ([(64, 64), (32, 32)], [64]),  # a second loss over some of them
        ([(50, 50)], [50]),  # what a mask leaves
        ([(50, 150)], [50]),
        ([(32, 32), (32, 32)], [32, 32]),
        ([(32, None), (32, None)], [32, 32]),
        ([(24, None), (24, None), (16, None)], [24, 24, 16]),
        ([(20, 20), (20, 20), (20, 20)], [20, 20, 20]),  # the rest is dropped
    ],
)
def test_a_pass_takes_part_of_its_batch_only_where_the_parts_or_the_loss_say_so(
    passes: list[tuple[int | None, int | None]], expected: list[int]
):
    assert taken(*passes) == [expected]


def test_parts_with_a_step_each():
    assert taken((32, None), (32, None), steps=True) == [[32], [32]]
    assert taken((20, 64), (20, 64), steps=True) == [[64], [64]]


def test_without_a_batch_s_size_the_model_s_input_says_it():
    assert taken((20, 64), size=None) == [[20]]


def test_the_losses_of_passes_over_one_batch_stay_together():
    tape = Tape()
    tape.add(BatchGiven(loader=0, epoch=0, index=0, size=64))
    for _ in range(2):
        tape.add(BackwardPass(terms=[term(64)], samples=20))
    tape.add(OptimizerStep())
    ((micro,),) = (update.microbatches for update in Story(tape).updates)
    assert len(micro.terms) == 2


def added(given: list[int], losses: int, *, ahead: int = 0) -> Story:
    """Passes that each come after so many batches, with the losses of one line; some batches are taken ahead."""
    tape = Tape()
    batches, index = sum(given) + ahead, 0
    tape.add(LoaderSeen(loader=0, samples=16 * batches, batches=batches, batch_size=16))
    for epoch in range(2):
        tape.add(EpochBegan(loader=0, epoch=epoch, batches=batches))
        for number, count in enumerate(given):
            for _ in range(count + ahead * (number == 0)):
                tape.add(BatchGiven(loader=0, epoch=epoch, index=index, size=16))
                index += 1
            tape.add(BackwardPass(terms=[term(16)] * losses, samples=16))
            tape.add(OptimizerStep(optimizer=0, rates=[0.1]))
        tape.add(EpochEnded(loader=0, epoch=epoch, batches=batches))
    return Story(tape)


@pytest.mark.parametrize(
    ("story", "samples", "window", "updates"),
    [
        (added([4, 4, 4], 4), 64, 4, 3),
        (added([4, 4, 4], 8), 64, 4, 3),  # a main and an auxiliary loss of each
        (added([4, 4, 4], 4, ahead=1), 64, 4, 3),
        (added([1] * 12, 2), 16, 1, 12),  # mixup
        (added([1] * 12, 2, ahead=2), 16, 1, 12),
        (added([4, 4, 4], 0), None, 1, None),  # a loss of one's own
        (added([4, 4, 4], 1), None, 1, None),  # one batch made of four
    ],
)
def test_batches_whose_losses_are_added_before_one_pass(
    story: Story, samples: int | None, window: int, updates: int | None
):
    assert (story.median_samples(), story.window, story.updates_an_epoch) == (samples, window, updates)


def test_a_last_pass_over_fewer_batches():
    assert [update.samples for update in added([4, 4, 2], 4).updates] == [64, 64, 32] * 2


def test_a_pass_after_two_optimizers_steps_is_over_the_same_batch():
    tape = Tape()
    tape.add(BatchGiven(loader=3, epoch=1, index=2, size=64))
    for _ in range(2):
        tape.add(BackwardPass(terms=[], samples=64))
        for optimizer in range(2):
            tape.add(OptimizerStep(optimizer=optimizer, rates=[0.1]))
    first, _, second, _ = Story(tape).updates
    assert [(m.loader, m.epoch, m.index, m.samples) for m in (*first.microbatches, *second.microbatches)] == [
        (3, 1, 2, 64)
    ] * 2


def test_a_look_at_a_batch_is_no_pass():
    """As `len(next(iter(loader))[0])` before each epoch; an epoch of one batch that trains is a pass."""
    tape = Tape()
    for epoch in range(6):
        tape.add(EpochBegan(loader=0, epoch=epoch, batches=4))
        tape.add(BatchGiven(loader=0, epoch=epoch, index=0, size=8))
        if epoch % 2:
            tape.add(BackwardPass(terms=[term(8)], samples=8))
            tape.add(OptimizerStep(optimizer=0, rates=[0.1]))
    assert [event.epoch for event in Story(tape).epochs(0)] == [1, 3, 5]


def trained(tape: Tape, epoch: int, *, batches: int, a: int, length: int = 10, ends: bool = True) -> None:
    """A pass of so many batches over the loader, with a step after `a` of them and one for the rest."""
    tape.add(EpochBegan(loader=0, epoch=epoch, batches=length, planned=4))
    for index in range(batches):
        tape.add(BatchGiven(loader=0, epoch=epoch, index=index, size=8))
        tape.add(BackwardPass(terms=[], samples=8))
        if (index + 1) % a == 0 or index + 1 == batches:
            tape.add(OptimizerStep(optimizer=0, rates=[0.1]))
    if ends:
        tape.add(EpochEnded(loader=0, epoch=epoch))


@pytest.mark.parametrize(("batches", "a", "ends", "updates"), [(10, 4, True, 3), (6, 2, False, 3), (10, 1, True, 10)])
def test_updates_of_an_epoch_are_counted_with_its_tail_and_where_the_loop_leaves_it(
    batches: int, a: int, ends: bool, updates: int
):
    tape = Tape([LoaderSeen(loader=0, samples=80, batches=10, batch_size=8)])
    for epoch in range(2):
        trained(tape, epoch, batches=batches, a=a, ends=ends)
    assert Story(tape).updates_an_epoch == updates


def test_of_a_pass_that_was_cut_the_updates_are_what_its_batches_make():
    tape = Tape([LoaderSeen(loader=0, samples=80, batches=10, batch_size=8)])
    trained(tape, 0, batches=4, a=2, ends=False)
    assert Story(tape).updates_an_epoch == 5, "none has ended"
    tape.add(EpochEnded(loader=0, epoch=0, cut=True))
    trained(tape, 1, batches=4, a=2, ends=False)
    assert Story(tape).updates_an_epoch == 5


def test_passes_that_only_evaluate_are_no_epochs_of_a_loader_that_trains():
    """As where the training accuracy is measured on the training loader after each epoch, or statistics before all."""
    tape = Tape([LoaderSeen(loader=0, samples=80, batches=10, batch_size=8)])
    for number in range(5):
        if number % 2:
            trained(tape, number, batches=10, a=1)
        else:
            tape.add(EpochBegan(loader=0, epoch=number, batches=10, planned=1))
            tape.events += [BatchGiven(loader=0, epoch=number, index=index, size=8) for index in range(10)]
            tape.add(EpochEnded(loader=0, epoch=number, trained=False))
    story = Story(tape)
    assert [event.epoch for event in story.epochs(0)] == [1, 3]
    assert (story.planned, story.updates_an_epoch) == (4, 10)

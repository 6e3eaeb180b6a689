"""A minibatch that grows: where its phases begin, that the stream of samples is the same, and the rate."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onehour.rules.minibatch import Minibatch
from onehour.rules.ramp import Ramp, RampedSchedule, parse_ramp
from onehour.rules.schedule import gradual_warmup, step_decay
from onehour.rules.shuffle import SampleStream

EPOCHS = st.fractions(Fraction(1, 50), 3, max_denominator=60)


@given(samples=st.integers(1, 400), untils=st.sets(EPOCHS, max_size=3), n=st.integers(1, 5))
def test_a_phase_ends_before_the_first_iteration_that_begins_at_or_behind_its_epoch(
    samples: int, untils: set[Fraction], n: int
):
    stages = [(Minibatch(n, 2**k), until) for k, until in enumerate([*sorted(untils), None])]
    ramp, position, iteration = Ramp.of(stages, samples=samples), 0, 0
    while position < 4 * samples:  # an iteration after another, by the definition
        minibatch = next(size for size, until in stages if until is None or position < until * samples)
        assert ramp.at(iteration).minibatch == ramp.holding(position).minibatch == minibatch
        assert (ramp.position(iteration), ramp.reaching(position)) == (position, iteration)
        assert ramp.reaching(position + 1) == iteration + 1
        iteration, position = iteration + 1, position + minibatch.size
    assert ramp.reaching(4 * samples) == iteration
    parts = ramp.parts(range(1, iteration))
    assert [t for part in parts for t in part] == [*range(1, iteration)]
    assert all(len({ramp.at(t) for t in part}) == 1 for part in parts)


def test_the_samples_are_those_of_any_other_stream_of_the_seed():
    """Whole epochs one after another, worker j with every k-th; as a copy in another process has them."""
    stages = [(Minibatch(2, 1), Fraction(1, 2)), (Minibatch(2, 4), None)]
    ramp = Ramp.of(stages, samples=10)
    given = SampleStream(samples=10, minibatch=Minibatch(2, 4), seed=3, ramp=ramp)
    stream = pickle.loads(pickle.dumps(given))
    taken = np.concatenate([stream.indices(t) for t in range(ramp.reaching(30))])
    other = SampleStream(samples=10, minibatch=1, seed=3)
    assert taken.tolist() == [int(other.indices(s)[0]) for s in range(len(taken))]
    assert stream.indices(5, worker=2).tolist() == stream.indices(5)[2::4].tolist()
    with pytest.raises(ValueError, match="worker must lie in 0 … 0"):
        stream.indices(2, worker=1)


def test_epochs_may_be_plain_numbers_and_no_minibatch_may_outgrow_the_data():
    stages = [(Minibatch(2, 1), 0.5), (Minibatch(2, 4), None)]  # as typed; a Fraction to a type checker
    ramp = Ramp.of(stages, samples=10)  # type: ignore[arg-type]
    assert SampleStream(samples=10, minibatch=8, seed=0, ramp=ramp).indices(3).shape == (8,)
    with pytest.raises(ValueError, match="minibatch 8 is larger than the data set of 7 samples"):
        SampleStream(samples=7, minibatch=2, seed=0, ramp=ramp)


def test_the_rate_is_that_of_a_run_at_the_minibatch_and_epoch():
    small, large = step_decay(0.4, [8, 16]), gradual_warmup(step_decay(3.2, [8, 16]), 0.1, epochs=5)
    schedule = RampedSchedule(((0.0, small), (2.0, large)))
    assert [schedule(epoch) for epoch in (0, 1.99)] == [0.4, 0.4]
    assert [schedule(epoch) for epoch in (2, 4.5, 8, 20)] == [large(epoch) for epoch in (2, 4.5, 8, 20)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["256"], "ramp has '256'; expected a minibatch and its last epoch, such as 256:8"),
        ([8], "ramp has 8; expected"),
        (["256:1/0"], "ramp has '256:1/0'; expected"),
        (["256:2", "128:4"], "ramp's minibatches must be above zero and growing, got 256, 128"),
        (["128:4", "256:4"], "ramp's epochs must be above zero and growing, got 4, 4"),
        ("128:0", "ramp's epochs must be above zero and growing, got 0"),
    ],
)
def test_what_is_no_ramp_is_refused(given: object, message: str):
    with pytest.raises(ValueError, match=message):
        parse_ramp(given)

"""What an evaluation adds to metrics.jsonl and timing.jsonl: sums divided once, by what they are sums of."""

from typing import Any

import pytest

from onehour import Recipe
from onehour.training.decisions import decisions_of
from onehour.training.measure import Metrics, measured, timed
from onehour.training.record import PARTS
from onehour.training.task import Evaluation

RESULT = Evaluation(errors=3, samples=60, loss=0.25)


def record(done: int, totals: tuple[float, float] = (0.0, 0.0), **changes: Any) -> Metrics:
    """Of a run of 48 samples in minibatches of 20: epochs end inside the iterations 3, 5 and 8."""
    values: dict[str, Any] = {"samples": 48, "minibatch": 20, "per_worker": 4, "base_minibatch": 10, "epochs": 3}
    values |= {"warmup_epochs": 2, **changes}
    return measured(decisions_of(Recipe(**values)), done, list(totals), RESULT)


@pytest.mark.parametrize(("done", "epoch", "iterations"), [(3, 1, 3), (5, 2, 2), (8, 3, 3)])
def test_losses_and_errors_are_those_of_the_iterations_since_the_evaluation_before(
    done: int, epoch: int, iterations: int
):
    found = record(done, (6.0, 30.0))
    assert (found.epoch, found.iteration, found.position) == (epoch, done, 20 * done)
    assert found.train_loss == 6.0 / iterations
    assert found.train_error == pytest.approx(100 * 30 / (20 * iterations))
    assert (found.val_loss, found.error) == (0.25, 5.0)


def test_the_rate_is_that_of_the_last_iteration_and_a_pitfalls_where_there_is_one():
    """From .1 to .2 in two epochs; iteration 4, the fifth, begins at epoch 80/48."""
    assert record(5).lr == pytest.approx(0.1 + 0.1 * (80 / 48) / 2)
    assert record(5, pitfall="warmup-per-epoch").lr == pytest.approx(0.1 + 0.1 * 1 / 2)


def test_a_minibatch_of_all_samples_is_an_epoch_of_one_iteration():
    for done in (1, 2, 3):
        found = record(done, (0.5, 24.0), minibatch=48)
        assert (found.epoch, found.train_loss, found.train_error) == (done, 0.5, 50.0)


STEPS = [dict.fromkeys(PARTS, 4.0), dict.fromkeys(PARTS, 2.0) | {"data": 0.0}]


def test_time_is_the_runs_own_and_its_share_where_several_were_one_network():
    measures: Any = {"seconds": 2.0, "cpu_seconds": 3.0, "evaluating": 1.0, "steps": STEPS}
    line = record(2)
    alone, shared = timed(line, 40, **measures), timed(line, 40, **measures, runs=4)
    times = {"seconds": 2.0, "cpu_seconds": 3.0, "images_per_second": 20.0, "evaluate_seconds": 1.0}
    parts = {"parts": ["data", "compute", "reduction", "update"], "steps_ms": [[4.0] * 4, [0.0, 2.0, 2.0, 2.0]]}
    assert alone == {"epoch": 0, "iteration": 2, "images": 40} | times | parts
    assert list(shared) == list(alone)
    assert shared["images"] == 40  # its own
    assert [shared[key] for key in ("seconds", "cpu_seconds", "evaluate_seconds")] == [0.5, 0.75, 0.25]
    assert shared["images_per_second"] == shared["images"] / shared["seconds"]
    assert shared["steps_ms"] == [[1.0, 1.0, 1.0, 1.0], [0.0, 0.5, 0.5, 0.5]]

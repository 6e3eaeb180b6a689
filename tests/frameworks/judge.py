"""Whether tapes hold what the stream, the schedule and the epochs say."""

from __future__ import annotations

from typing import Any

from onehour import Minibatch, SampleStream, gradual_warmup, step_decay

EPOCHS, MINIBATCH = 3, Minibatch(per_worker=2, workers=4)
SCHEDULE = gradual_warmup(step_decay(0.4, [2]), start_lr=0.1, epochs=1)


def expected(samples: int, first: int, stop: int, process: int, processes: int) -> list[Any]:
    """What a process does from one iteration to another: its workers' samples, the rate, a validation an epoch."""
    stream = SampleStream(samples=samples, minibatch=MINIBATCH, seed=0)
    hosted = MINIBATCH.workers // processes
    ends = {MINIBATCH.iterations(samples, epoch + 1) for epoch in range(EPOCHS)}
    tape: list[Any] = []
    for iteration in range(first, stop):
        indices = stream.indices(iteration, range(process * hosted, (process + 1) * hosted))
        tape += [["samples", indices.tolist()], ["rate", SCHEDULE(iteration * MINIBATCH.size / samples)]]
        tape += ["validation"] * (iteration + 1 in ends)
    return tape


def begun(tape: list[Any]) -> list[Any]:
    """A tape from its first training on: what is validated before it is of the run before, or a trial."""
    first = next((at for at, entry in enumerate(tape) if entry != "validation"), len(tape))
    return tape[first:]

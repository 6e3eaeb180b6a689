"""Steps of several optimizers judged from recorded numbers alone."""

import pytest

from onehour.check.case import Case
from onehour.check.judge import judge
from onehour.check.story import Story
from onehour.check.tape import BackwardPass, OptimizerStep, Tape


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

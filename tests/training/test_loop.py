"""What a whole run does besides learning: it stops where it must, says what it lacks, traces itself."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from simulated_gpu import SimulatedGpu
from torch.utils.data import TensorDataset

from onehour.api import train
from onehour.config import Recipe
from onehour.dist.watchdog import Stopping
from onehour.training.record import NonFiniteError, Run, StoppedError


def test_a_run_that_leaves_the_finite_numbers_keeps_its_last_finite_checkpoint(tiny: ModuleType, tmp_path: Path):
    """Sample 5 is met in the first epoch; here it goes bad after that."""
    images, labels = tiny.data()[0].tensors
    data = (TensorDataset(images, labels), tiny.data()[1])
    calls = []

    def spoil() -> bool:
        calls.append(1)
        if len(calls) == 9:
            images[:, 0, 0, 0] = tiny.HUGE
        return False

    with pytest.raises(NonFiniteError, match=r"not finite at iteration 9 \(epoch 1\.50, rate 0\.1\)") as raised:
        train(tiny.recipe(), out=tmp_path / "run", data=data, stop_asked=spoil)
    assert str(tmp_path / "run") in str(raised.value)
    run = Run(tmp_path / "run")
    assert not run.finished
    assert run.summary["outcome"] == "non-finite"
    assert [record["iteration"] for record in run.metrics] == [6]
    assert [path.name for path in (run.folder / "checkpoints").iterdir()] == ["iteration-000000006"]


@pytest.mark.parametrize("stops", [False, True])
def test_a_gpu_whose_flags_come_late_saves_no_masked_update(tiny: ModuleType, tmp_path: Path, stops: bool):
    """Neither by --save-every nor by a stop asked at the iteration before: the next start would go on behind it."""
    recipe = tiny.recipe(data="tinytask:poisoned", seed=8)  # sample 5 is in the third iteration
    calls = iter(range(1, 99))
    for asked in ((lambda: stops and next(calls) == 2), lambda: False):
        with SimulatedGpu(), pytest.raises(NonFiniteError, match="not finite at iteration 3 "):
            train(recipe, out=tmp_path / "run", save_every=1, stop_asked=asked, device="cuda")
        assert max(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == "iteration-000000002"


@pytest.mark.parametrize("model", ["Greedy", "GreedyOnHost"])
def test_out_of_memory_names_the_next_workers_per_pass_and_that_one_runs(tiny: ModuleType, tmp_path: Path, model: str):
    recipe = tiny.recipe(minibatch=16, base_minibatch=16, model=f"tinytask:{model}")
    with pytest.raises(ValueError, match=r"out of memory with 4 workers in a pass; give --workers-per-pass 2,"):
        train(recipe, out=tmp_path / "run")
    assert train(recipe, out=tmp_path / "run", workers_per_pass=2).finished


def test_out_of_memory_with_one_worker_in_a_pass_names_what_else_helps(tiny: ModuleType, tmp_path: Path):
    with pytest.raises(ValueError, match=r"one worker in a pass; use --precision bf16, or a smaller --per-worker"):
        train(tiny.recipe(model="tinytask:Hungry"), out=tmp_path / "run", workers_per_pass=1)


def test_an_error_of_a_model_is_one_message_with_its_line_and_keeps_its_trace(tiny: ModuleType, tmp_path: Path):
    class Broken(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny.net()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("a bug of my own")
            return self.net(images)

    with pytest.raises(ValueError, match=r"RuntimeError: a bug of my own \(.*test_loop\.py:\d+\)") as failed:
        train(tiny.recipe(), out=tmp_path / "run", model=Broken())
    assert isinstance(failed.value.__cause__, RuntimeError)
    assert failed.value.__cause__.__traceback__ is not None


def test_a_profile_is_a_chrome_trace(tiny: ModuleType, tmp_path: Path):
    train(tiny.recipe(), out=tmp_path / "run", profile=2)
    trace = json.loads((tmp_path / "run" / "trace-0.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == 2
    assert any("conv" in name for name in names)


def test_save_every_saves_between_evaluations_too(tiny: ModuleType, tmp_path: Path):
    train(tiny.recipe(), out=tmp_path / "run", save_every=5)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["iteration-000000010", "iteration-000000012"]  # of 5, 6, 10 and 12 the last two


@pytest.mark.parametrize(("epochs", "last"), [(3, (3, 8, 160)), (2.5, (2.5, 6, 120))])
def test_minibatches_that_straddle_epochs_are_evaluated_after_the_first_that_ends_past_each(
    tiny: ModuleType, tmp_path: Path, epochs: float, last: tuple[float, int, int]
):
    """48 samples in minibatches of 20: epochs end inside iterations 3, 5 and 8, and a run ends where it does."""
    run = train(tiny.recipe(minibatch=20, base_minibatch=20, epochs=epochs), out=tmp_path / "run")
    assert run.finished
    assert [(r["epoch"], r["iteration"], r["position"]) for r in run.metrics] == [(1, 3, 60), (2, 5, 100), last]
    # Each training error is that of the iterations since the one before: a count out of so many samples.
    for record, samples in zip(run.metrics, (60, 40, last[2] - 100), strict=True):
        assert record["train_error"] * samples / 100 == pytest.approx(round(record["train_error"] * samples / 100))


def test_the_training_error_is_that_of_the_iterations_since_the_evaluation_before(tiny: ModuleType, tmp_path: Path):
    """With a rate of next to nothing every epoch has the errors of the initial weights."""
    run = train(tiny.recipe(base_lr=1e-30, minibatch=16, base_minibatch=16, epochs=3), out=tmp_path / "run")
    errors = [record["train_error"] for record in run.metrics]
    losses = [record["train_loss"] for record in run.metrics]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.05)  # groups of n differ between epochs, and so the loss
    assert errors == pytest.approx([errors[0]] * 3, abs=15)
    assert losses[0] > 0.5


@pytest.mark.parametrize("changes", [{"precision": "bf16"}, {"channels_last": True}, {"optimizer": "adamw"}])
def test_options_train_and_keep_float32_weights(tiny: ModuleType, tmp_path: Path, changes: dict[str, object]):
    run = train(tiny.recipe(**changes), out=tmp_path / "run")
    assert {tensor["dtype"] for tensor in run.summary["parameter_tensors"].values()} == {"float32"}
    plain = train(tiny.recipe(), out=tmp_path / "plain")
    assert run.metrics[-1]["train_loss"] == pytest.approx(plain.metrics[-1]["train_loss"], rel=0.3)


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_a_compiled_model_learns_the_same(tiny: ModuleType, tmp_path: Path):
    plain, compiled = (train(tiny.recipe(compile=flag), out=tmp_path / str(flag)) for flag in (False, True))
    assert compiled.metrics[-1]["train_loss"] == pytest.approx(plain.metrics[-1]["train_loss"], rel=1e-4)
    assert compiled.metrics[-1]["val_loss"] == pytest.approx(plain.metrics[-1]["val_loss"], rel=1e-4)


def stop_in_evaluation(recipe: Recipe, out: Path, evaluation: int) -> None:
    """A signal comes in the evaluation that has this number, from 1 on."""
    looks = iter(range(1, 100))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Stopping, "is_asked", lambda self: False)
        patched.setattr(Stopping, "is_signalled", lambda self: next(looks) == evaluation)
        with pytest.raises(StoppedError, match=f"stopped after iteration {6 * evaluation} and saved"):
            train(recipe, out=out)


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_run_stopped_in_an_evaluation_leaves_the_bits_of_an_undisturbed_one(
    tiny: ModuleType, tmp_path: Path, evaluation: int, capsys: pytest.CaptureFixture[str]
):
    whole = train(tiny.recipe(), out=tmp_path / "whole")
    iteration = 6 * evaluation
    stop_in_evaluation(tiny.recipe(), tmp_path / "run", evaluation)
    assert [record["iteration"] for record in Run(tmp_path / "run").metrics] == [6][: evaluation - 1]
    saved = tmp_path / "run" / "checkpoints" / f"iteration-{iteration:09d}" / "progress.json"
    assert json.loads(saved.read_text())["evaluated"] is False
    capsys.readouterr()
    run = train(tiny.recipe(), out=tmp_path / "run")
    assert capsys.readouterr().out.count("images/s") == 2 - evaluation  # none followed the one that was made up for
    assert (run.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()
    assert run.summary["state_sha256"] == whole.summary["state_sha256"]


def test_an_evaluation_that_was_made_up_for_is_not_recorded_twice(tiny: ModuleType, tmp_path: Path):
    """Killed after it, before the next checkpoint."""
    whole = train(tiny.recipe(), out=tmp_path / "whole")
    stop_in_evaluation(tiny.recipe(), tmp_path / "run", 1)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(whole.metrics[0]) + "\n")
    train(tiny.recipe(), out=tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()

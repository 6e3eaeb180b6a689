"""The number of processes does not matter (§2.3, §3), and torch's own data parallelism is the oracle."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from onehour.dist.group import Group
from onehour.training.record import Run

World = Callable[[int], Path]


def state(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights with statistics, and velocity, as the run's last checkpoint holds them."""
    last = sorted((run / "checkpoints").glob("iteration-*"))[-1]
    return load_file(last / "model.safetensors"), load_file(last / "optimizer.safetensors")


def farthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert list(a) == list(b)
    assert all(a[name].dtype == b[name].dtype for name in a)
    return max((float((a[name].double() - b[name].double()).abs().max()) for name in a), default=0.0)


@pytest.mark.parametrize(
    ("processes", "workers", "passes"),
    [(1, "k5", "apart"), (2, "k4", "together"), (4, "k4", "together"), (2, "k5", "together"), (2, "k5", "apart")],
)
def test_float64_runs_are_equal_on_any_number_of_processes(world: World, processes: int, workers: str, passes: str):
    one, some = world(1) / f"{workers}-together", world(processes) / f"{workers}-{passes}"
    for alone, shared in zip(state(one), state(some), strict=True):
        assert farthest(alone, shared) <= 1e-12
    statistics = state(some)[0]["bn1.running_var"]
    assert (statistics - 1).abs().min() > 1e-3  # they have moved
    assert state(some)[0]["bn1.num_batches_tracked"] == 20
    assert Run(some).summary["iterations"] == 20


def test_a_run_with_other_weights_and_divided_data_is_equal_on_two_processes(world: World):
    for alone, shared in zip(*(state(world(p) / "start") for p in (1, 2)), strict=True):
        assert farthest(alone, shared) <= 1e-12
    runs = [Run(world(p) / "start") for p in (1, 2)]
    assert runs[0].metrics[-1]["top1_error"] == runs[1].metrics[-1]["top1_error"]
    for run in runs:
        assert run.recipe.samples == run.environment["training_samples"] == 160 - run.environment["validation_samples"]
        assert run.environment["init_anew"] == ["fc.weight", "fc.bias"]
    assert runs[0].environment["init_sha256"] == runs[1].environment["init_sha256"]


def test_a_run_that_passes_workers_together_differs_where_they_are_others(world: World):
    weights = [state(world(1) / f"{name}-together")[0] for name in ("k4", "k5")]
    assert farthest(*weights) > 1e-3


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("name", ["k4-together", "float32"])
def test_the_record_is_that_of_one_process(world: World, processes: int, name: str):
    alone, shared = Run(world(1) / name).metrics, Run(world(processes) / name).metrics
    assert [r["top1_error"] for r in shared] == [r["top1_error"] for r in alone]
    assert [r["train_error"] for r in shared] == [r["train_error"] for r in alone]
    assert [r["train_loss"] for r in shared] == pytest.approx([r["train_loss"] for r in alone], rel=1e-6)
    assert len(alone) == 4


@pytest.mark.parametrize("processes", [2, 4])
def test_a_float32_gradient_differs_in_the_order_of_adding_only(world: World, processes: int):
    alone, shared = (state(world(p) / "gradient")[1] for p in (1, processes))
    flat = [torch.cat([velocity[name].flatten() for name in velocity]) for velocity in (alone, shared)]
    assert flat[0].norm() > 1e-3
    assert (flat[1] - flat[0]).norm() / flat[0].norm() <= 1e-5


@pytest.mark.parametrize("processes", [2, 4])
def test_float32_stays_within_a_hundred_thousandth_after_20_steps(world: World, processes: int):
    alone, shared = (state(world(p) / "float32") for p in (1, processes))
    assert farthest(alone[0], shared[0]) <= 1e-5
    assert farthest(alone[1], shared[1]) <= 1e-5


@pytest.mark.parametrize("what", ["weights and velocity", "statistics"])
@pytest.mark.parametrize("processes", [1, 2])
def test_torchs_data_parallelism_gives_the_same_after_20_steps(world: World, processes: int, what: str):
    ours = state(world(processes) / "k2")
    theirs = [load_file(world(2) / f"ddp-{name}.safetensors") for name in ("model", "optimizer")]
    for mine, oracle in zip(ours, theirs, strict=True):
        chosen = [name for name in oracle if ("running" in name) == (what == "statistics")]
        assert farthest({n: mine[n] for n in chosen}, {n: oracle[n] for n in chosen}) <= 1e-12


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_has_the_same_bits(world: World, processes: int):
    alone = json.loads((world(1) / "evaluations-0.json").read_text())
    for rank in range(processes):
        assert json.loads((world(processes) / f"evaluations-{rank}.json").read_text()) == alone
    for samples in (1001, 100):
        (errors, count, loss), listed = (alone[f"{kind} {samples}"] for kind in ("tensors", "listed"))
        assert [errors, count] == listed[:2]
        assert count == samples
        assert float.fromhex(loss) == pytest.approx(float.fromhex(listed[2]), rel=1e-6)


def test_what_no_worker_used_keeps_its_value_and_what_one_used_counts_as_zeros_elsewhere(world: World):
    one = json.loads((world(1) / "branching-0.json").read_text())
    two = [json.loads((world(2) / f"branching-{rank}.json").read_text()) for rank in (0, 1)]
    assert two[0] == two[1]
    torch.testing.assert_close(torch.tensor(two[0]), torch.tensor(one), rtol=0, atol=1e-12)
    sometimes, never = zip(*one, strict=True)
    assert set(map(tuple, never)) == {(1.0, 1.0, 1.0)}
    # Used in iteration 2 alone: no decay and no momentum moves it before or after.
    before, after = sometimes[:3], sometimes[3:]
    assert set(map(tuple, before)) == {(1.0, 1.0, 1.0)}
    assert len(after) == 4
    assert len(set(map(tuple, after))) == 1
    assert all(abs(value - 1) > 1e-4 for value in after[0])


def test_one_worker_that_is_not_finite_masks_the_update_of_all(world: World):
    told = [json.loads((world(2) / f"not-finite-{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    seen = told[0]["seen"]
    # Before iterations 0, 1, 2 and 3, and after it.
    assert len(set(seen[:4])) == 4
    assert seen[4] == seen[3]
    assert "not finite at iteration 4" in told[0]["said"]
    run = Run(world(2) / "not-finite")
    assert run.summary["outcome"] == "non-finite"
    assert run.summary["final_error"] is None
    assert run.summary["weights_sha256"] == seen[3]
    kept = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert kept == ["iteration-000000002", "iteration-000000003"]


def test_a_stop_asked_of_one_process_stops_all_at_the_same_iteration(world: World):
    for rank in (0, 1):
        said = json.loads((world(2) / f"stopped-float32-{rank}.json").read_text())
        assert "stopped after iteration 8" in said
    assert (world(2) / "copy-float32" / "checkpoints" / "iteration-000000008").is_dir()


def test_two_processes_resumed_leave_the_bits_of_an_undisturbed_run(world: World):
    whole, resumed = Run(world(2) / "float32"), Run(world(2) / "stopped-float32")
    for key in ("weights_sha256", "state_sha256"):
        assert resumed.summary[key] == whole.summary[key]
    assert (resumed.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["beyond", "muon", "ramp", "adascale"])
def test_neither_processes_nor_a_stop_change_a_bit_of_what_goes_beyond_the_paper(
    world: World, worlds: ModuleType, tmp_path: Path, name: str
):
    """Clipping, averaged weights, frozen layers and rates of layers; stopped on two processes, gone on with by one."""
    whole, folders = Run(world(1) / name), [world(2) / name]
    if name in worlds.STOPPED:
        shutil.copytree(world(2) / f"copy-{name}", tmp_path / name)
        worlds.run(Group(), tmp_path, name)
        folders += [world(2) / f"stopped-{name}", tmp_path / name]
    for folder in folders:
        assert Run(folder).summary["state_sha256"] == whole.summary["state_sha256"]
        assert (folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


def test_one_process_goes_on_with_what_two_left(world: World, worlds: ModuleType, tmp_path: Path):
    """Stopped at iteration 8 on two processes; in float64 the end is that of one process from the beginning."""
    shutil.copytree(world(2) / "copy-k4-together", tmp_path / "k4-together")
    worlds.run(Group(), tmp_path, "k4-together")
    for alone, resumed in zip(state(world(1) / "k4-together"), state(tmp_path / "k4-together"), strict=True):
        assert farthest(alone, resumed) <= 1e-12
    whole, run = Run(world(1) / "k4-together"), Run(tmp_path / "k4-together")
    for key in ("iteration", "train_error", "top1_error"):
        assert [record[key] for record in run.metrics] == [record[key] for record in whole.metrics]


def test_a_command_in_processes_that_someone_started_runs_once_and_then_prints(world: World):
    codes = [json.loads((world(2) / f"commands-{rank}.json").read_text()) for rank in (0, 1)]
    assert codes[0] == codes[1]
    assert codes[0]["first"] == codes[0]["again"]  # the code, and when the record was last written
    assert codes[0]["first"][0] == 0
    assert codes[0]["not finite"][0] == 4
    assert Run(world(2) / "launched").finished


def test_bytes_and_sums_reach_every_process(world: World):
    for rank in (0, 1):
        assert json.loads((world(2) / f"exchange-{rank}.json").read_text()) == [True, [3.0, 20.0]]

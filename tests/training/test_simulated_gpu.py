"""Whole runs on a simulated GPU: they end as on the CPU, mix no devices, race with nothing, wait where they must."""

import multiprocessing
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_gpu import GpuError, SimulatedGpu
from simulated_gpu.streams import Event, Stream
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import onehour
from onehour import Recipe
from onehour.data import augment
from onehour.data.dataset import FaultError, KeyedDataset
from onehour.dist.devices import WARMUPS, CapturedIteration
from onehour.models.resnet import resnet8
from onehour.training import measure, statistics
from onehour.training.record import NonFiniteError, Run, StoppedError
from onehour.training.step import Step

ITERATIONS = 8
ADAPTIVE = ("adam", "adamw", "nadam", "radam")
REPLAYED = ITERATIONS - WARMUPS


@pytest.fixture(autouse=True)
def alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are added in one order on both devices, and nothing is left of another one."""
    monkeypatch.setattr(statistics, "IN_ORDER", ("cpu", "cuda"))
    augment._constants.cache_clear()


class Bytes(KeyedDataset):
    """Keyed images of bytes, as those of a folder or a pack are."""

    def __init__(self, samples: int, *, unreadable: int | None = None) -> None:
        draws = np.random.default_rng(samples)
        self.images = draws.integers(0, 256, (samples, 8, 8, 3), dtype=np.uint8)
        self.labels = draws.integers(0, 3, samples)
        self.unreadable, self.skips = unreadable, unreadable is not None

    @property
    def facts(self) -> dict[str, Any]:
        usual = Recipe()
        skip = "skip" if self.skips else "error"
        return {"bad_images": skip, "exif_orientation": usual.exif_orientation, "pixel_cap": usual.pixel_cap}

    def __len__(self) -> int:
        return len(self.images)

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        if index == self.unreadable:
            raise FaultError(f"image {index}", "cannot be read", "restore it")
        image = torch.from_numpy(self.images[index]).permute(2, 0, 1)
        return (image.flip(-1) if key & 1 else image), int(self.labels[index])

    def prepare(self, images: Tensor) -> Tensor:
        return augment.normalise(images, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def images() -> tuple[Bytes, Bytes]:
    return Bytes(64), Bytes(20)


def recipe(**changes: Any) -> Recipe:
    """k = 4 workers of 4, 4 iterations an epoch, 2 epochs, on a network of ours, which is known to draw nothing."""
    common: dict[str, Any] = {"model": "resnet8", "minibatch": 16, "per_worker": 4, "base_minibatch": 16}
    common |= {"name": "small", "base_lr": 0.05, "epochs": 2, "warmup": "none", "classes": 3}
    return Recipe(**(common | changes))


def train(out: Path, *, device: str, **options: Any) -> Run:
    given: dict[str, Any] = {"workers_per_pass": 2, "loaders": 0, "data": images()}
    places = (*given, "save_every", "stop_asked", "model", "noise")
    changes = {name: options.pop(name) for name in list(options) if name not in places}
    return onehour.train(recipe(**changes), out=out, device=device, **(given | options))


def digest(run: Run) -> str:
    return run.summary["state_sha256"]


def in_memory() -> Any:
    return tuple(
        TensorDataset(side.prepare(torch.from_numpy(side.images).permute(0, 3, 1, 2)), torch.from_numpy(side.labels))
        for side in images()
    )


SKIPPING = Bytes(1024, unreadable=3), Bytes(20)
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "float64": {"precision": "float64"},
    "bf16": {"precision": "bf16"},
    "channels_last": {"channels_last": True},
    "bf16 channels_last": {"precision": "bf16", "channels_last": True},
    "canonical": {"reduce": "canonical", "workers_per_pass": 1},
    "canonical channels_last": {"reduce": "canonical", "channels_last": True, "workers_per_pass": 1},
    "one pass": {"workers_per_pass": 4},
    "unequal passes": {"workers_per_pass": 3},
    "loaders": {"loaders": 2},
    "skip": {"loaders": 2, "bad_images": "skip", "minibatch": 256, "per_worker": 64, "data": SKIPPING, "epochs": 1},
    "momentum inside": {"pitfall": "momentum-inside-uncorrected"},
    "statistics k times": {"pitfall": "batchnorm-stats-k-times"},
    "saves": {"save_every": 1},
    "mixed": {"random_erasing": 0.5, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1},
    "clipped, averaged": {"clip_norm": 0.5, "ema": 0.9, "freeze": ("conv1.*", "bn1.*"), "layer_rates": ("fc.*=0.5",)},
}


SLOW = ("bf16", "channels_last", "canonical", "one pass", "saves")
"""Each is a part of another case."""


@pytest.mark.parametrize(
    "options",
    [pytest.param(given, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, given in CASES.items()],
)
def test_a_run_ends_as_on_the_cpu(options: dict[str, Any], tmp_path: Path):
    expected = train(tmp_path / "cpu", device="cpu", **options)
    with SimulatedGpu() as gpu:
        found = train(tmp_path / "gpu", device="cuda", **options)
    assert digest(found) == digest(expected)
    assert [record["train_loss"] for record in found.metrics] == [record["train_loss"] for record in expected.metrics]
    launched = {"precision": "float64", "bad_images": "skip", "pitfall": "momentum-inside-uncorrected"}
    captured = not launched.items() & {name: str(value) for name, value in options.items()}.items()
    assert sum(count for (what, _), count in gpu.launches.items() if what == "a graph") == captured * REPLAYED


@pytest.mark.parametrize(
    "optimizer",
    [
        *("adam", "rmsprop"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "nadam", "radam", "adagrad")),
    ],
)
def test_other_optimizers_end_as_on_the_cpu_but_for_rounding(optimizer: str, tmp_path: Path):
    options = {"optimizer": optimizer, "base_lr": 0.001, "momentum": 0.0, "precision": "float64"}
    expected = train(tmp_path / "cpu", device="cpu", **options)
    with SimulatedGpu():
        found = train(tmp_path / "gpu", device="cuda", **options)
    for mine, other in zip(found.metrics, expected.metrics, strict=True):
        assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)


def test_the_gradient_noise_is_measured_beside_captured_iterations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "MINIBATCHES", 2)
    expected = train(tmp_path / "cpu", device="cpu", noise=True)
    with SimulatedGpu() as gpu:
        found = train(tmp_path / "gpu", device="cuda", noise=True)
    assert digest(found) == digest(expected)
    (point,) = found.noise
    assert point[0] > WARMUPS
    assert point == pytest.approx(expected.noise[0], rel=1e-6)
    assert sum(count for (what, _), count in gpu.launches.items() if what == "a graph") == REPLAYED


def test_data_in_memory_lies_on_the_device(tmp_path: Path):
    expected = train(tmp_path / "cpu", device="cpu", data=in_memory())
    with SimulatedGpu():
        assert digest(train(tmp_path / "gpu", device="cuda", data=in_memory())) == digest(expected)


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(tmp_path: Path):
    expected = train(tmp_path / "cpu", device="cpu")
    asked = iter(range(100))
    with SimulatedGpu():
        with pytest.raises(StoppedError):
            train(tmp_path / "gpu", device="cuda", stop_asked=lambda: next(asked) == 5)
        assert digest(train(tmp_path / "gpu", device="cuda")) == digest(expected)


@pytest.mark.parametrize("optimizer", ["rmsprop", *(pytest.param(name, marks=pytest.mark.slow) for name in ADAPTIVE)])
def test_what_an_optimizer_counts_on_the_device_is_there_after_a_stop(optimizer: str, tmp_path: Path):
    options = {"optimizer": optimizer, "base_lr": 0.001, "momentum": 0.0}
    asked = iter(range(100))
    with SimulatedGpu():
        expected = train(tmp_path / "whole", device="cuda", **options)
        with pytest.raises(StoppedError):
            train(tmp_path / "stopped", device="cuda", stop_asked=lambda: next(asked) == 5, **options)
        assert digest(train(tmp_path / "stopped", device="cuda", **options)) == digest(expected)


def test_a_loss_that_is_not_finite_ends_the_run_at_the_same_iteration(tmp_path: Path):
    told: list[str] = []
    for device in ("cpu", "cuda"):
        with SimulatedGpu(), pytest.raises(NonFiniteError) as caught:
            train(tmp_path / device, device=device, base_lr=1e30)
        told.append(str(caught.value).replace(str(tmp_path / device), ""))
    assert told[0] == told[1]


class Watched:
    """What each iteration of a run made the host do, by line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpu: SimulatedGpu) -> None:
        self.waits: list[list[tuple[str, str]]] = []
        self.uploads: list[Counter[tuple[str, str]]] = []
        self.between: list[list[tuple[str, str]]] = []
        call, before = Step.__call__, [0]

        def watched(step: Step, *args: Any, **options: Any) -> Any:
            waits, uploads = len(gpu.waits), gpu.uploads.copy()
            self.between.append(gpu.waits[before[0] : waits])
            found = call(step, *args, **options)
            self.waits.append(gpu.waits[waits:])
            self.uploads.append(gpu.uploads - uploads)
            before[0] = len(gpu.waits)
            return found

        monkeypatch.setattr(Step, "__call__", watched)


ADAM: dict[str, Any] = {"optimizer": "adamw", "base_lr": 0.001, "momentum": 0.0}


@pytest.mark.parametrize("options", [{}, {"loaders": 2}, {"data": in_memory()}, ADAM])
def test_the_host_waits_for_nothing_in_a_step_and_once_after_it(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """For the two flags of the iteration before; its copies to the device are pinned, so they wait for nothing."""
    with SimulatedGpu() as gpu:
        watched = Watched(monkeypatch, gpu)
        train(tmp_path / "run", device="cuda", **options)
    for iteration in (5, 6):  # after the capture and the first evaluation, before the last one
        assert watched.waits[iteration] == []
        assert [re.sub(r":\d+", "", line) for _, line in watched.between[iteration]] == ["dist/devices.py"]
        assert all(kind == "pinned" for kind, _ in watched.uploads[iteration])


def act(rank: int, processes: int, port: int, out: Path, options: dict[str, Any]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with SimulatedGpu(gpus=processes):
        train(out, device="cuda", **options)


@pytest.mark.parametrize(
    ("processes", "options"), [(2, {"reduce": "canonical", "workers_per_pass": 1}), (3, {"workers_per_pass": 1})]
)
def test_several_processes_reduce_on_their_devices(processes: int, options: dict[str, Any], port: int, tmp_path: Path):
    expected = train(tmp_path / "cpu", device="cpu", **options)
    context = multiprocessing.get_context("fork")
    given = (processes, port, tmp_path / "gpu", options)
    world = [context.Process(target=act, args=(rank, *given)) for rank in range(processes)]
    for process in world:
        process.start()
    for process in world:
        process.join()
    assert [process.exitcode for process in world] == [0] * processes
    found = Run(tmp_path / "gpu")
    if "reduce" in options:
        assert digest(found) == digest(expected)
    losses = [record["train_loss"] for record in expected.metrics]
    assert [record["train_loss"] for record in found.metrics] == pytest.approx(losses, rel=1e-4)


class Waits(nn.Module):
    """A model whose forward asks the device for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet8(channels=3, classes=3)

    def forward(self, images: Tensor) -> Tensor:
        assert images.sum().item() < 1e9
        return self.net(images)


class OnHost(Bytes):
    """Gives the model a tensor that was left on the host."""

    def prepare(self, images: Tensor) -> Tensor:
        return super().prepare(images) + torch.zeros(3, 1, 1)


class AsksInALoader(Bytes):
    """Uses the device in a process that was forked."""

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        torch.cuda.current_stream()
        return super().keyed(index, key)


def nothing(*_: Any, **__: Any) -> None:
    pass


def planted(where: Path, message: str, **options: Any) -> None:
    with SimulatedGpu(), pytest.raises((GpuError, ValueError), match=message):
        train(where, device="cuda", **options)


def test_it_finds_a_missing_wait_between_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Stream, "wait_stream", nothing)
    planted(tmp_path, "race: .* another stream still")


def test_it_finds_a_missing_record_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with SimulatedGpu(), monkeypatch.context() as patched:
        patched.setattr(Tensor, "record_stream", nothing)
        with pytest.raises(GpuError, match="record_stream is missing"):
            train(tmp_path, device="cuda", optimizer="adagrad", momentum=0.0)


def test_it_finds_flags_that_are_read_while_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Event, "synchronize", nothing)
    planted(tmp_path, "while a copy to it is in flight")


def test_it_finds_a_tensor_that_was_left_on_the_host(tmp_path: Path):
    planted(tmp_path, "a CPU tensor meets tensors on the GPU", data=(OnHost(64), OnHost(20)))


def test_it_finds_a_forked_process_that_uses_the_device(tmp_path: Path):
    planted(tmp_path, "forked subprocess", data=(AsksInALoader(64), AsksInALoader(20)), loaders=1)


def test_it_finds_a_wait_in_a_step_and_the_run_goes_on_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    expected = train(tmp_path / "cpu", device="cpu", model=Waits, workers_per_pass=4)
    with SimulatedGpu() as gpu:
        watched = Watched(monkeypatch, gpu)
        assert digest(train(tmp_path / "gpu", device="cuda", model=Waits, workers_per_pass=4)) == digest(expected)
    assert ("aten::_local_scalar_dense", "test_simulated_gpu.py") in {
        (what, line.partition(":")[0]) for what, line in watched.waits[-1]
    }
    said = capsys.readouterr()
    assert "the model cannot be captured as a CUDA graph" in said.out + said.err


def test_statistics_of_a_kept_batchnorm_lose_nothing_where_a_capture_is_given_up(tmp_path: Path):
    options: dict[str, Any] = {"batchnorm": "keep", "model": Waits, "per_worker": 16, "workers_per_pass": 1}
    expected = train(tmp_path / "cpu", device="cpu", **options)
    with SimulatedGpu():
        assert digest(train(tmp_path / "gpu", device="cuda", **options)) == digest(expected)


def test_it_finds_a_graph_that_reads_an_earlier_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = train(tmp_path / "cpu", device="cpu")
    call = CapturedIteration.__call__

    def stale(captured: CapturedIteration, batches: Any, rate: float, stopping: float) -> Any:
        kept = captured._batches if captured._graph is not None else list(batches)
        return call(captured, kept, rate, stopping)

    monkeypatch.setattr(CapturedIteration, "__call__", stale)
    with SimulatedGpu():
        assert digest(train(tmp_path / "gpu", device="cuda")) != digest(expected)


def test_it_finds_two_processes_on_one_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with SimulatedGpu(), pytest.raises(GpuError, match="two ranks on one GPU"):
        torch.distributed.init_process_group("nccl", rank=0, world_size=1)

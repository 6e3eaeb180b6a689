"""No more processes than GPUs: fewer where nobody typed the number, words where somebody did. What a run leaves."""

import pytest
import torch

from onehour import Recipe
from onehour.dist.devices import deterministic, own_gpu, pick_processes, refuse_other_devices, refuse_too_few_gpus
from onehour.dist.group import joined


@pytest.fixture
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """As many as torch sees."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("gpus", "workers", "picked", "said"),
    [
        (1, 16, 1, "1 process: torch sees 1 GPU here, and each process needs one of its own; k does not change"),
        (4, 16, 4, "4 processes: torch sees 4 GPUs here"),
        (8, 2, 2, "2 processes"),
    ],
    indirect=["gpus"],
)
def test_a_process_for_each_gpu_as_far_as_there_are_workers(gpus: int, workers: int, picked: int, said: str):
    processes, line = pick_processes("cuda", workers)
    assert processes == picked
    assert line.startswith(said)


@pytest.mark.parametrize(("cores", "workers", "picked"), [(1, 16, 1), (2, 16, 2), (64, 16, 2), (64, 1, 1)])
def test_two_processes_on_a_cpu_of_two_cores(monkeypatch: pytest.MonkeyPatch, cores: int, workers: int, picked: int):
    monkeypatch.setattr("onehour.dist.devices.cores", lambda: cores)
    assert pick_processes("cpu", workers) == (picked, "")


@pytest.mark.parametrize("gpus", [1, 3], indirect=True)
def test_more_processes_than_gpus_are_refused_with_both_numbers(gpus: int):
    refuse_too_few_gpus(gpus, "cuda")
    refuse_too_few_gpus(99, "cpu")
    with pytest.raises(
        ValueError, match=rf"--processes {gpus + 1} needs {gpus + 1} GPUs.* sees {gpus} GPU.*k does not"
    ):
        refuse_too_few_gpus(gpus + 1, "cuda")


@pytest.mark.parametrize("gpus", [2], indirect=True)
def test_each_process_takes_the_gpu_of_its_number(gpus: int):
    assert [own_gpu(rank, 2, shared=True) for rank in (0, 1)] == [0, 1]
    assert [own_gpu(rank, 4, shared=False) for rank in range(4)] == [0, 1, 0, 1]  # two of its own each, as srun deals


@pytest.mark.parametrize("gpus", [1], indirect=True)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_of_torchrun_refuses_a_host_of_too_few_gpus(
    gpus: int, rank: str, monkeypatch: pytest.MonkeyPatch
):
    """Before NCCL is asked, which says "Duplicate GPU" and a page more."""
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "a", "MASTER_PORT": "9"}
    for name, value in (place | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ValueError, match=r"2 processes were started on this host, and torch sees 1 GPU here"),
        joined("cuda"),
    ):
        pass


@pytest.mark.parametrize("gpus", [1], indirect=True)
def test_without_a_local_size_the_process_that_has_none_refuses(gpus: int):
    with pytest.raises(ValueError, match="3 processes were started"):
        own_gpu(2, 1, shared=True)


def test_processes_of_one_device_each_may_meet():
    refuse_other_devices([("a", "1", "cpu")] * 3)
    refuse_other_devices([("a", "1", "GPU 7"), ("a", "1", "GPU 8"), ("b", "2", "GPU 7")])


def test_two_with_one_gpu_are_named_however_they_came_to_it():
    with pytest.raises(ValueError, match=r"processes 0 and 2 \(a\) would both compute on GPU 7"):
        refuse_other_devices([("a", "1", "GPU 7"), ("b", "2", "GPU 7"), ("a", "1", "GPU 7")])


def test_a_host_without_a_gpu_among_others_is_named():
    with pytest.raises(ValueError, match=r"process 0 \(a\) computes on a GPU and process 1 \(b\) on the CPU"):
        refuse_other_devices([("a", "1", "GPU 7"), ("b", "2", "cpu")])


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_algorithms_are_as_deterministic_behind_a_canonical_run_as_before(mode: str):
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(mode)
    try:
        asked = torch.get_deterministic_debug_mode()
        with deterministic(Recipe(reduce="canonical")):
            assert torch.get_deterministic_debug_mode() == 2
        assert torch.get_deterministic_debug_mode() == asked
    finally:
        torch.set_deterministic_debug_mode(before)

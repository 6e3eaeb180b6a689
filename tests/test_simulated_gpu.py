"""The simulated GPU itself: what it says of devices, what it refuses, what it counts."""

from collections.abc import Callable

import pytest
import torch
from simulated_gpu import GpuError, SimulatedGpu
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore


@pytest.fixture
def gpu():
    with SimulatedGpu() as gpu:
        yield gpu


def test_tensors_lie_where_they_were_put_and_what_is_made_of_them_too(gpu: SimulatedGpu):
    there, here = torch.zeros(4, device="cuda"), torch.ones(4)
    assert there.is_cuda
    assert (there + 1).is_cuda
    assert there[1:].is_cuda
    assert torch.zeros_like(there).is_cuda
    assert there.device == torch.device("cuda", 0)
    assert not here.is_cuda
    assert here.device.type == "cpu"
    assert not there.cpu().is_cuda
    assert (there + torch.tensor(2.0)).tolist() == [2.0] * 4  # a number of the host's may meet them
    layer = nn.Linear(4, 2).to("cuda")
    layer(there).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda


@pytest.mark.parametrize(
    ("message", "act"),
    [
        ("a CPU tensor meets", lambda x: x + torch.ones(4)),
        ("convert cuda:0 device type tensor to numpy", lambda x: x.numpy()),
        ("only dense CPU tensors can be pinned", lambda x: x.pin_memory()),
        ("events without timing", lambda x: torch.cuda.Event().elapsed_time(torch.cuda.Event())),
    ],
)
def test_what_cuda_refuses_raises(message: str, act: Callable[[Tensor], object], gpu: SimulatedGpu):
    with pytest.raises(GpuError, match=message):
        act(torch.zeros(4, device="cuda"))


@pytest.mark.parametrize(
    "act", [lambda x: x.sum().item(), lambda x: bool(x[0]), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: x[x > 0]]
)
def test_what_waits_is_counted_with_its_line(act: Callable[[Tensor], object], gpu: SimulatedGpu):
    x = torch.ones(4, device="cuda")
    assert gpu.waits == []
    act(x)
    assert [line.partition(":")[0] for _, line in gpu.waits] == ["test_simulated_gpu.py"]


def test_a_copy_to_the_host_is_garbage_until_it_was_waited_for(gpu: SimulatedGpu):
    x, host = torch.full((4,), 3.0, device="cuda"), torch.empty(4, pin_memory=True)
    host.copy_(x, non_blocking=True)
    with pytest.raises(GpuError, match=r"the host reads .* while a copy to it is in flight"):
        host.sum()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert host.tolist() == [3.0] * 4


def test_pinned_memory_may_not_change_while_it_is_copied(gpu: SimulatedGpu):
    host = torch.zeros(4).pin_memory()
    there = host.to("cuda", non_blocking=True)
    with pytest.raises(GpuError, match=r"the host writes .* while a copy from it is in flight"):
        host.fill_(2)
    torch.cuda.synchronize()
    host.fill_(2)
    assert there.tolist() == [0.0] * 4


def test_a_pageable_copy_is_counted_as_one_and_a_large_one_waits(gpu: SimulatedGpu):
    torch.zeros(4).to("cuda", non_blocking=True)
    assert [kind for kind, _ in gpu.uploads] == ["pageable"]
    assert gpu.waits == []
    torch.zeros(100_000).to("cuda", non_blocking=True)
    assert [what for what, _ in gpu.waits] == ["upload (pageable)"]


def test_streams_that_do_not_wait_for_each_other_race(gpu: SimulatedGpu):
    beside = torch.cuda.Stream()
    with torch.cuda.stream(beside):
        x = torch.zeros(4, device="cuda")
        x.add_(1)
    with pytest.raises(GpuError, match=r"race: .* reads what another stream still writes"):
        _ = x + 1
    torch.cuda.current_stream().wait_stream(beside)
    assert (x + 1).tolist() == [2.0] * 4


def test_memory_that_is_freed_while_another_stream_uses_it_must_be_recorded(gpu: SimulatedGpu):
    def use(*, recorded: bool) -> None:
        beside = torch.cuda.Stream()
        with torch.cuda.stream(beside):
            x = torch.zeros(4, device="cuda")
        here = torch.cuda.current_stream()
        here.wait_stream(beside)
        y = x * 2
        if recorded:
            x.record_stream(here)
        del x
        y.add_(1)

    use(recorded=True)
    with pytest.raises(GpuError, match="record_stream is missing"):
        use(recorded=False)


def test_a_sum_over_processes_must_be_waited_for_before_it_is_used(gpu: SimulatedGpu):
    """A reduction goes on in a stream of its own, as NCCL's does."""
    torch.distributed.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    try:
        x = torch.ones(4, device="cuda")
        work = torch.distributed.all_reduce(x, async_op=True)
        assert work is not None
        with pytest.raises(GpuError, match=r"race: .* reads what another stream still writes"):
            _ = x + 1
        work.wait()
        assert (x + 1).tolist() == [2.0] * 4
        with pytest.raises(GpuError, match="all_reduce on a CPU tensor, and the group is NCCL's"):
            torch.distributed.all_reduce(torch.ones(4))
    finally:
        torch.distributed.destroy_process_group()


def captured(act: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        found = act()
    return graph, found


def test_a_capture_changes_nothing_and_each_replay_runs_it_on_what_lies_there(gpu: SimulatedGpu):
    x, total = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph, doubled = captured(lambda: total.add_(2 * x))
    assert total.tolist() == [0.0, 0.0]
    graph.replay()
    x.fill_(5)
    graph.replay()
    assert total.tolist() == doubled.tolist() == [12.0, 12.0]


def test_a_graph_keeps_the_numbers_of_the_host_that_it_was_captured_with(gpu: SimulatedGpu):
    rate, x = torch.tensor(1.0), torch.zeros((), device="cuda")
    graph, _ = captured(lambda: x.add_(rate))
    rate.fill_(100)
    graph.replay()
    assert x.item() == 1


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: torch.tensor(1.0, device="cuda"),
        lambda x: torch.zeros(4).to("cuda"),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_a_capture_forbids_raises(act: Callable[[Tensor], Tensor], gpu: SimulatedGpu):
    x = torch.ones(4, device="cuda")
    with pytest.raises(GpuError, match="not permitted when stream is capturing"):
        captured(lambda: act(x))
    assert x.sum().item() == 4  # and the device is usable again


def test_a_model_that_is_compiled_anew_in_a_capture_is_told(gpu: SimulatedGpu):
    def act() -> Tensor:
        torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1
        return torch.zeros(1, device="cuda")

    with pytest.raises(GpuError, match="compiled anew while it was captured"):
        captured(act)

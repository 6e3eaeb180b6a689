"""One vector an iteration: fixed buckets, each reduced as soon as its gradients are complete (§3, §4)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onehour.dist.group import Group
from onehour.dist.reducer import Reducer


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size)) for size in sizes]


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for another process that gives the same: a sum is twice what is here. Returns what happened."""
    events: list[str] = []

    def all_reduce(bucket: Tensor, op: Any, async_op: bool) -> Any:
        assert op == torch.distributed.ReduceOp.SUM
        assert async_op
        bucket.mul_(2)
        events.append(f"reduce {bucket.numel()}")
        return SimpleNamespace(wait=lambda: events.append("wait"))

    monkeypatch.setattr("onehour.dist.reducer.dist.all_reduce", all_reduce)
    return events


@pytest.mark.parametrize("size", [1, 2])
def test_passes_add_up_and_an_iteration_begins_with_zeros(monkeypatch: pytest.MonkeyPatch, size: int):
    events = elsewhere(monkeypatch)
    (a,) = parameters(2)
    reducer = Reducer([a], tail=1, group=Group(size=size))
    for _ in range(2):
        reducer.zero()
        assert reducer.tail.tolist() == [0]
        for number in range(3):
            if number == 2:
                reducer.arm()
            a.sum().backward()
        reducer.tail += 5
        reducer.finish()
        assert given(a) == [3.0 * size] * 2
        assert reducer.tail.tolist() == [5 * size]
    assert events == ["reduce 3", "wait"] * 2 * (size - 1)  # one process reduces nothing


@pytest.mark.parametrize("size", [1, 2])
def test_all_that_was_summed_is_told(monkeypatch: pytest.MonkeyPatch, size: int):
    elsewhere(monkeypatch)
    a, b = parameters(2, 3)
    reducer = Reducer([a, b], tail=1, group=Group(size=size), bucket_bytes=1)
    reducer.zero()
    reducer.arm()
    (a.sum() + 2 * b.sum()).backward()
    reducer.tail += 7
    reducer.finish()
    told = sorted(torch.cat([tensor.flatten() for tensor in reducer.summed()]).tolist())
    assert told == [value * size for value in (1, 1, 2, 2, 2, 7)]


@pytest.mark.parametrize("size", [1, 2])
def test_parameters_without_a_gradient_are_known_before_the_sum_and_zeros_in_it(
    monkeypatch: pytest.MonkeyPatch, size: int
):
    elsewhere(monkeypatch)
    a, b, c = parameters(2, 3, 4)
    reducer = Reducer([a, b, c], tail=0, group=Group(size=size))
    for _ in range(2):
        reducer.zero()
        reducer.arm()
        b.sum().backward()
        named = [reducer.parameters[number] for number in reducer.mark()]
        assert {id(parameter) for parameter in named} == {id(a), id(c)}
        reducer.finish()
        assert given(b) == [size] * 3
        assert a.grad is None or given(a) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("bucket_bytes", "sizes"),
    [(1, [3, 2, 4 + 1]), (4 * 5, [3 + 2, 4 + 1]), (4 * 4, [3 + 2, 4 + 1]), (4 * 6, [9 + 1]), (10**9, [9 + 1])],
)
def test_buckets_close_at_a_size_last_parameters_first_and_the_last_takes_the_tail(bucket_bytes: int, sizes: list[int]):
    reducer = Reducer(parameters(4, 2, 3), tail=1, group=Group(size=2), bucket_bytes=bucket_bytes)
    assert [bucket.numel() for bucket in reducer.buckets] == sizes


def given(parameter: nn.Parameter) -> list[float]:
    assert parameter.grad is not None
    return parameter.grad.tolist()


def test_a_bucket_is_reduced_while_backward_goes_on(monkeypatch: pytest.MonkeyPatch):
    events = elsewhere(monkeypatch)
    a, b, c = parameters(4, 3, 2)
    reducer = Reducer([a, b, c], tail=1, group=Group(size=2), bucket_bytes=1)
    reducer.zero()
    reducer.arm()

    def noted(tensor: Tensor, name: str) -> Tensor:
        tensor.register_hook(lambda gradient: events.append(f"backward reaches {name}"))
        return tensor

    # A chain, so that gradients arrive in the order c, b, a.
    first = noted(a.sum() * 1, "a")
    second = noted((first * b).sum(), "b")
    (second * c).sum().backward()
    reducer.tail += 1
    reducer.finish()
    assert [event for event in events if event.startswith("reduce")] == ["reduce 2", "reduce 3", "reduce 5"]
    assert events.index("reduce 2") < events.index("backward reaches a")
    assert events[-3:] == ["wait"] * 3
    assert (given(c), given(b), given(a)) == ([24.0] * 2, [16.0] * 3, [12.0] * 4)
    assert reducer.tail.tolist() == [2]


@pytest.mark.parametrize("used_first", ["a", "b", "c", "none"])
@pytest.mark.parametrize("used_last", ["a", "b", "c", "none"])
def test_buckets_are_reduced_in_one_order_whatever_arrives(
    monkeypatch: pytest.MonkeyPatch, used_first: str, used_last: str
):
    """And nothing before the last pass. Processes that use different parameters would sum one bucket with another."""
    events = elsewhere(monkeypatch)
    a, b, c = parameters(4, 3, 2)
    reducer = Reducer([a, b, c], tail=1, group=Group(size=2), bucket_bytes=1)
    reducer.zero()
    losses = {"a": a.sum(), "b": b.sum(), "c": c.sum(), "none": torch.zeros(1, requires_grad=True).sum()}
    losses[used_first].backward(retain_graph=True)
    assert events == []
    reducer.arm()
    losses[used_last].backward()
    reducer.finish()
    assert [event for event in events if event != "wait"] == ["reduce 2", "reduce 3", "reduce 5"]
    for name, parameter in (("a", a), ("b", b), ("c", c)):
        times = 2.0 * ((used_first == name) + (used_last == name))
        assert given(parameter) == [times] * len(parameter)


def test_more_of_a_gradient_that_was_said_to_be_complete_is_refused(monkeypatch: pytest.MonkeyPatch):
    """As where a reentrant checkpoint runs a shared layer twice: its first half would travel alone."""
    elsewhere(monkeypatch)
    a, b = parameters(2, 3)
    reducer = Reducer([a, b], tail=1, group=Group(size=2), bucket_bytes=1)
    reducer.zero()
    reducer.arm()
    b.sum().backward()
    with pytest.raises(ValueError, match=r"of shape \(3,\) got more of its gradient .* use_reentrant=False"):
        b.sum().backward()


def test_a_gradient_of_an_iteration_before_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    elsewhere(monkeypatch)
    a, b = parameters(4, 3)
    reducer = Reducer([a, b], tail=1, group=Group(size=2), bucket_bytes=1)
    for loss, expected in ((lambda: a.sum() + b.sum(), [2.0] * 7), (lambda: b.sum(), [0.0] * 4 + [2.0] * 3)):
        reducer.zero()
        reducer.arm()
        loss().backward()
        reducer.finish()
        assert given(a) + given(b) == expected


def test_gradients_keep_the_memory_format_of_their_parameters(monkeypatch: pytest.MonkeyPatch):
    elsewhere(monkeypatch)
    convolution = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    reducer = Reducer(list(convolution.parameters()), tail=0, group=Group(size=2))
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    reducer.zero()
    reducer.arm()
    convolution(images).square().sum().backward()
    reducer.finish()
    gradient = convolution.weight.grad
    assert gradient is not None
    assert gradient.stride() == convolution.weight.stride()
    plain = nn.Conv2d(3, 4, 3, bias=False)
    plain.load_state_dict(convolution.state_dict())
    (2 * plain(images).square().sum()).backward()
    torch.testing.assert_close(gradient, plain.weight.grad)


def test_a_parameter_with_gaps_in_memory_gets_a_gradient_of_its_own_shape(monkeypatch: pytest.MonkeyPatch):
    elsewhere(monkeypatch)
    a = nn.Parameter(torch.ones(4, 6)[:, ::2])
    reducer = Reducer([a], tail=1, group=Group(size=2))
    reducer.zero()
    reducer.arm()
    (a * torch.arange(12.0).view(4, 3)).sum().backward()
    reducer.finish()
    assert a.grad is not None
    assert a.grad.flatten().tolist() == [2.0 * number for number in range(12)]


def test_parameters_of_several_types_are_refused():
    mixed = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).double())]
    with pytest.raises(ValueError, match=r"one dtype and device, found.*float32.*float64"):
        Reducer(mixed, tail=0, group=Group())


def test_closed_it_leaves_the_parameters_alone(monkeypatch: pytest.MonkeyPatch):
    events = elsewhere(monkeypatch)
    a, b = parameters(2, 3)
    reducer = Reducer([a, b], tail=0, group=Group(size=2), bucket_bytes=1)
    reducer.zero()
    reducer.arm()
    b.sum().backward()
    assert events == ["reduce 3"]
    reducer.zero()
    reducer.arm()
    reducer.close()
    b.sum().backward()
    assert events == ["reduce 3"]

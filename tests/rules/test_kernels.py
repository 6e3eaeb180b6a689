"""The kernels of ghost BatchNorm, on the CPU by Triton's interpreter; and what a GPU's compiler makes of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import onehour.rules.batchnorm as layers
from onehour.rules.batchnorm import GhostBatchNorm2d, accumulate, batchnorm_relu, convert_batchnorm
from onehour.rules.kernels import Ghost, ghost_backward, ghost_forward

COMPILED = Path(__file__).parents[1] / "helpers" / "compile_kernels.py"
EPS = 1e-5


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels must write holds NaN before."""
    for name in ("empty", "empty_like"):
        made: Callable[..., Tensor] = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, made=made, **options: spoilt(made(*a, **options)))


def spoilt(tensor: Tensor) -> Tensor:
    return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor


def nhwc(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, mean: float = 0.0) -> Tensor:
    """Samples of different means and widths."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw) * (1 + torch.arange(shape[0]) % 3).view(-1, 1, 1, 1) + mean
    return (x + torch.arange(shape[0]).view(-1, 1, 1, 1) % 5).to(dtype).contiguous(memory_format=torch.channels_last)


def reference(x: Tensor, gamma: Tensor | None, beta: Tensor | None, r: Tensor | None, n: int, relu: bool) -> tuple:
    """Equations 5 to 7 for each worker's rows j, j + g, …; and its means and unbiased variances."""
    g = len(x) // n
    rows = x.view(n, g, *x.shape[1:])
    mean = rows.mean((0, 3, 4), keepdim=True)
    variance = (rows - mean).square().mean((0, 3, 4), keepdim=True)
    y = ((rows - mean) / (variance + EPS).sqrt()).view(x.shape)
    if gamma is not None and beta is not None:
        y = y * gamma[:, None, None] + beta[:, None, None]
    y = y if r is None else y + r
    count = rows[:, 0, 0].numel()
    statistics = torch.stack([mean.view(g, -1), variance.view(g, -1) * count / (count - 1)])
    return y.relu() if relu else y, statistics


def difference(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return float(((actual.double() - expected).norm() / expected.norm()).detach())


CASES = {
    "odd channels": {"n": 4, "g": 2, "channels": 5, "side": 3},
    "one worker": {"n": 8, "g": 1, "channels": 16, "side": 4},
    "one row": {"n": 1, "g": 3, "channels": 7, "side": 5},
    "one pixel": {"n": 16, "g": 2, "channels": 66, "side": 1},
    "several tiles and parts": {"n": 8, "g": 2, "channels": 8, "side": 5},
    "many workers": {"n": 4, "g": 9, "channels": 3, "side": 2},
    "wide": {"n": 3, "g": 2, "channels": 256, "side": 2},
}


KINDS = ("", "relu", "shortcut", "shortcut relu", "plain relu")
DRAWN = [*(("odd channels", kind) for kind in KINDS), *((case, "shortcut relu") for case in list(CASES)[1:])]


@pytest.mark.parametrize(("case", "kind"), DRAWN)
def test_outputs_statistics_and_gradients_are_the_equations(case: str, kind: str):
    shape = CASES[case]
    n, size = shape["n"], (shape["n"] * shape["g"], shape["channels"], shape["side"], shape["side"])
    dtype = torch.bfloat16 if case == "one worker" else torch.float32
    x, upstream = nhwc(*size, dtype=dtype), nhwc(*size, seed=1, dtype=dtype)
    shortcut = nhwc(*size, seed=2, dtype=dtype) if "shortcut" in kind else None
    draw = torch.Generator().manual_seed(3)
    gamma, beta = torch.rand(2, shape["channels"], generator=draw) + 0.5 if "plain" not in kind else (None, None)
    relu = "relu" in kind
    given = [x, gamma, beta, shortcut]
    exact = [None if t is None else t.double().requires_grad_() for t in given]
    expected, statistics = reference(*exact, n, relu)  # type: ignore[misc]
    asked = [t for t in exact if t is not None]
    gradients = torch.autograd.grad(expected, asked, upstream.double())
    mine = [None if t is None else t.clone(memory_format=torch.preserve_format).requires_grad_() for t in given]
    y, found = Ghost.apply(*mine, n, EPS, relu)
    y.backward(upstream)
    bound = 4e-3 if dtype == torch.bfloat16 else 2e-6
    assert difference(y, expected) < bound
    assert difference(found, statistics) < 1e-6
    for tensor, gradient in zip([t for t in mine if t is not None], gradients, strict=True):
        assert difference(tensor.grad, gradient) < 2 * bound, case


def test_a_mean_that_is_large_beside_the_width_costs_no_accuracy():
    """Which E[x²] - E[x]² in float32 loses altogether."""
    x = nhwc(8, 4, 6, 6, mean=3e3)
    _, statistics = reference(x.double(), None, None, None, 4, False)
    _, found = ghost_forward(x, None, None, None, 4, EPS, False)
    assert difference(found[1], statistics[1]) < 2e-4
    rows = x.view(4, 2, 4, 6, 6)
    naive = rows.square().mean((0, 3, 4)) - rows.mean((0, 3, 4)).square()
    assert difference(naive, statistics[1]) > 1e-2


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, in the interpreter
def test_what_is_not_finite_stays_in_its_worker_and_channel():
    x, upstream = nhwc(8, 6, 3, 3), nhwc(8, 6, 3, 3, seed=1)
    clean = ghost_forward(x, None, None, None, 4, EPS, True)
    for value in (torch.nan, torch.inf):
        dirty = x.clone(memory_format=torch.preserve_format)
        dirty[2, 3, 1, 1] = value  # worker 0 of 2 has the even rows
        y, statistics = ghost_forward(dirty, None, None, None, 4, EPS, True)
        assert y[::2, 3].isnan().all()
        assert not statistics[:, 0, 3].isfinite().any()
        kept = torch.ones_like(x, dtype=torch.bool)
        kept[::2, 3] = False
        assert y[kept].equal(clean[0][kept])
        dx, _, _ = ghost_backward(upstream, dirty, None, None, None, statistics, 4, EPS, True, False)
        assert dx[::2, 3].isnan().all()
        assert dx[kept].isfinite().all()


def test_a_second_run_has_the_same_bits():
    x, gamma, beta = nhwc(8, 6, 3, 3), torch.rand(6), torch.rand(6)
    runs = []
    for _ in range(2):
        y, statistics = ghost_forward(x, gamma, beta, x, 4, EPS, True)
        runs.append([y, statistics, *ghost_backward(x, x, y, gamma, beta, statistics, 4, EPS, True, True)])
    assert all(a.equal(b) for a, b in zip(*runs, strict=True))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Layers use the kernels on the CPU; what each call asked of them: its ReLU."""
    calls: list[bool] = []
    apply = Ghost.apply

    def counted(*given: Any) -> Any:
        calls.append(given[-1])
        return apply(*given)

    monkeypatch.setattr(Ghost, "apply", counted)
    monkeypatch.setattr(layers, "kernels_take", lambda x: x.is_contiguous(memory_format=torch.channels_last))
    return calls


def trained(layer: nn.Module, x: Tensor, forward: Callable[..., Tensor]) -> list[Tensor]:
    """Everything that an iteration of two passes leaves."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with accumulate(layer):
        for half in (x[:8], x[8:]):
            (forward(half) * nhwc(8, 6, 3, 3, seed=1)).sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in layer.parameters() if p.grad is not None), *layer.buffers()]


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_learns_the_same_by_either_way(frozen: bool, taken: list[bool]):
    results = []
    for contiguous in (torch.channels_last, torch.contiguous_format):
        layer = GhostBatchNorm2d(6, per_worker=4)
        layer.bias.requires_grad_(not frozen)
        x = nhwc(16, 6, 3, 3).contiguous(memory_format=contiguous)
        shortcut = nhwc(8, 6, 3, 3, seed=4).contiguous(memory_format=contiguous)
        results.append(trained(layer, x, lambda half, layer=layer, s=shortcut: batchnorm_relu(layer, half, s)))
    assert taken == [True, True]
    for mine, native in zip(*results, strict=True):
        torch.testing.assert_close(mine, native, rtol=1e-5, atol=1e-6)


def test_a_sequence_applies_the_relu_in_the_same_pass(taken: list[bool]):
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6), nn.Dropout(0.0))
    assert convert_batchnorm(model, 4) is model
    x = nhwc(8, 6, 3, 3)
    expected = model[3](model[2](model[1](model[0](x))))  # layer by layer, nothing is applied early
    assert taken == [False, False]
    torch.testing.assert_close(model(x), expected)
    assert taken == [False, False, True, False]
    model.eval()
    torch.testing.assert_close(model(x), model[2](model[1](model[0](x))))
    seen: list[Any] = []
    model.train()[0].register_forward_hook(lambda module, given, output, seen=seen: seen.append(output))
    model(x)
    assert taken[4:] == [False, False], "somebody looks at what lies between"
    assert seen[0].min() < 0
    assert list(model.state_dict()) == list(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)).state_dict())


def test_a_sequence_of_ones_own_class_is_left_alone(taken: list[bool]):
    class Own(nn.Sequential):
        pass

    model = convert_batchnorm(Own(nn.BatchNorm2d(6), nn.ReLU()), 4)
    assert type(model) is Own
    model(nhwc(8, 6, 3, 3))
    assert taken == [False]


class NormAct(nn.BatchNorm2d):
    """A class of someone's own."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act, self.drop = act, nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class Twice(NormAct):
    """Does more than a ReLU, though it has no other layer."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("make", "relu"),
    [
        (lambda: NormAct(6, nn.ReLU(inplace=True)), True),
        (lambda: NormAct(6, nn.SiLU()), False),
        (lambda: NormAct(6, nn.LeakyReLU()), False),
        (lambda: Twice(6, nn.ReLU()), False),
    ],
)
def test_a_class_of_ones_own_applies_its_relu_in_the_same_pass_and_nothing_else(
    make: Callable[[], nn.Module], relu: bool, taken: list[bool]
):
    model = convert_batchnorm(nn.Sequential(make(), nn.ReLU()), 4)
    taken.clear()  # of the trial
    x = nhwc(8, 6, 3, 3)
    found = model(x)
    assert taken == [relu]
    torch.testing.assert_close(found, model(x.contiguous()))
    assert taken == [relu]
    seen: list[Tensor] = []
    model[0].act.register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))  # type: ignore[index]
    model(x)
    assert taken == [relu, False], "somebody looks at what lies between"
    assert seen[0].min() < 0


def test_a_class_of_ones_own_that_is_given_more_than_a_batch_does_it_itself(taken: list[bool]):
    class Scaled(NormAct):
        def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
            return scale * super().forward(input)

    layer = convert_batchnorm(Scaled(6, nn.ReLU()), 4)
    x = nhwc(8, 6, 3, 3)
    torch.testing.assert_close(layer(x, 2.0), 2 * layer(x))
    torch.testing.assert_close(layer(x, scale=2.0), 2 * layer(x))


@pytest.mark.parametrize(
    ("takes", "options", "layout"),
    [
        (True, {}, torch.channels_last),
        (True, {"dtype": torch.bfloat16}, torch.channels_last),
        (False, {"dtype": torch.float64}, torch.channels_last),
        (False, {"device": "cpu"}, torch.channels_last),
        (False, {"device": "cuda:1"}, torch.channels_last),  # Triton launches on the current GPU
        (False, {}, torch.contiguous_format),
    ],
    ids=str,
)
def test_who_is_taken(
    takes: bool, options: dict[str, Any], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with FakeTensorMode():
        strides = (54, 1, 18, 6) if layout == torch.channels_last else (54, 9, 3, 1)
        given: dict[str, Any] = {"device": "cuda", "dtype": torch.float32} | options
        assert layers.kernels_take(torch.empty_strided((8, 6, 3, 3), strides, **given)) is takes


def test_what_cannot_be_added_in_the_same_pass_is_added_behind_it(taken: list[bool]):
    layer = GhostBatchNorm2d(6, per_worker=4)
    x, shortcut = nhwc(8, 6, 3, 3), nhwc(8, 6, 3, 3, seed=4)
    expected = layer(x, shortcut, relu=True)
    assert taken == [True]
    torch.testing.assert_close(layer(x, shortcut.contiguous(), relu=True), expected)
    layer(x, shortcut.double(), relu=True)
    assert taken == [True]


@pytest.mark.parametrize("given", [("80", "64"), pytest.param(("90", "64", "256"), marks=pytest.mark.slow)], ids=str)
def test_a_gpus_compiler_finds_wide_loads_and_no_spills(given: tuple[str, ...]):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(COMPILED), *given], capture_output=True, text=True, env=environ, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["name"] for kernel in found} == {"_moments", "_normalise", "_gradient_sums", "_gradient"}
    for kernel in found:
        assert "ld.global.v4.b32" in kernel["loads"], kernel
        assert kernel["stack"] == 0, kernel
        assert kernel["name"] in ("_moments", "_gradient_sums") or "st.global.v4.b32" in kernel["stores"], kernel
        assert not any("atom" in word or "red." in word for word in kernel["stores"]), kernel

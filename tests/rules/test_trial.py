"""§2.3 for classes of someone's own that normalise and then do more: each worker's samples alone, the rest kept."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from exactness import exact
from torch import Tensor, nn
from torch.nn import functional as F

from onehour.rules.batchnorm import accumulate, convert_batchnorm

N, K, C = 4, 3, 5  # n, k and channels


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: torch's forward written out, then drop and act."""

    def __init__(self, channels: int, act: Callable[[], nn.Module] = nn.SiLU, drop: float = 0.0, **options: Any):
        super().__init__(channels, **options)
        self.drop, self.act = nn.Dropout(drop) if drop else nn.Identity(), act()

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        kept = not self.training or self.track_running_stats
        mean, variance = (self.running_mean, self.running_var) if kept else (None, None)
        training, momentum = self.training or self.running_mean is None, self.momentum or 0.0
        x = F.batch_norm(x, mean, variance, self.weight, self.bias, training, momentum, self.eps)
        return self.act(self.drop(x))


class Scaled(nn.BatchNorm1d):
    """Calls BatchNorm's forward, and has a parameter of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(2 * input)


class InFloat32(nn.BatchNorm2d):
    """As mixed precision by hand has it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.running_mean)).to(input)  # type: ignore[arg-type]


class OnePlus(nn.BatchNorm2d):
    """γ lies around 0, and is given to the function as 1 + γ."""

    def forward(self, input: Tensor) -> Tensor:
        return F.batch_norm(input, self.running_mean, self.running_var, 1 + self.weight, self.bias, self.training)


KINDS: dict[str, tuple[Callable[[], nn.BatchNorm1d | nn.BatchNorm2d], tuple[int, ...]]] = {
    "silu": (partial(NormAct, C), (3, 2)),
    "relu in place": (partial(NormAct, C, partial(nn.ReLU, inplace=True), eps=0.1), (3, 2)),
    "no parameters": (partial(NormAct, C, nn.PReLU, affine=False), (3, 2)),
    "no running statistics": (partial(NormAct, C, track_running_stats=False), (3, 2)),
    "own parameter": (partial(Scaled, C), ()),
    "1 + γ": (partial(OnePlus, C), (3, 2)),
    "cast": (partial(InFloat32, C), (3, 2)),
}


def batch(*size: int, seed: int = 0) -> Tensor:
    """Workers' means differ."""
    x = torch.randn(N * K, C, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x + (torch.arange(N * K) % K).view(-1, *[1] * (x.ndim - 1))


def varied(layer: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(1)
    for tensor in layer.double().state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=draw)
    return layer


def learned(layer: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output for x, its gradient and the parameters', added to what they have."""
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * upstream).sum().backward()
    assert x.grad is not None
    return [output.detach(), x.grad]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_k_separate_passes_of_n_with_the_same_keys(kind: str):
    make, size = KINDS[kind]
    own = varied(make())
    ghost = convert_batchnorm(nn.Sequential(copy.deepcopy(own)), per_worker=N)[0]  # type: ignore[index]
    assert isinstance(ghost, type(own))
    assert list(ghost.state_dict()) == list(own.state_dict())
    alone, x, upstream = [copy.deepcopy(own) for _ in range(K)], batch(*size), batch(*size, seed=2)
    parts = [learned(layer, x[j::K], upstream[j::K]) for j, layer in enumerate(alone)]
    for number, whole in enumerate(learned(ghost, x, upstream)):
        exact([whole[j::K] for j in range(K)], [part[number] for part in parts])
        pooled = learned(copy.deepcopy(own), x, upstream)[number]
        assert (whole - pooled).abs().max() > 1e-2, "statistics over kn are another loss"
    for name, parameter in ghost.named_parameters():
        exact(parameter.grad, torch.stack([layer.get_parameter(name).grad for layer in alone]).sum(0))  # type: ignore[misc]
    for name, buffer in ghost.named_buffers():
        means = torch.stack([layer.get_buffer(name).double() for layer in alone]).mean(0)
        exact(buffer.double(), means if buffer.is_floating_point() else torch.ones_like(means))
    alone[0].load_state_dict(ghost.state_dict())
    exact(ghost.eval()(x), alone[0].eval()(x))


@pytest.mark.parametrize("kind", ["silu", "own parameter"])
def test_statistics_of_several_passes_move_once(kind: str):
    make, size = KINDS[kind]
    together, split = (convert_batchnorm(varied(make()), per_worker=N) for _ in range(2))
    together(batch(*size))
    with accumulate(split):
        for j in range(K):
            split(batch(*size)[j::K])
    exact(split.state_dict(), together.state_dict())
    assert split.num_batches_tracked == 1


def test_what_comes_after_is_the_models_own_and_sees_what_it_saw():
    act, seen = nn.ReLU(), []
    model = nn.Sequential(NormAct(C, lambda: act, drop=0.5), nn.ReLU())
    act.register_forward_hook(lambda module, given, output: seen.append(given[0].clone()))
    model = convert_batchnorm(model, per_worker=N)
    assert model[0].act is act  # type: ignore[index]
    assert not seen, "a trial's batch is no one's"
    assert model(batch(3, 2).float()).min() >= 0
    zeros = (seen[0] == 0).float().mean()
    assert 0.3 < zeros < 0.7, "it drops while training"
    assert seen[0].min() < 0


def test_it_can_be_copied_and_pickled():
    ghost = convert_batchnorm(varied(NormAct(C)), per_worker=N)
    vars(ghost)["_compiled_call_impl"] = lambda: None  # as after `compile`: torch leaves it out
    for again in (copy.deepcopy(ghost), pickle.loads(pickle.dumps(ghost))):
        assert type(again) is type(ghost)
        exact(again(batch(3, 2)), copy.deepcopy(ghost)(batch(3, 2)))


class ByHand(nn.BatchNorm2d):
    """Takes the batch's own mean, whoever is in it."""

    def forward(self, input: Tensor) -> Tensor:
        return input - input.mean((0, 2, 3), keepdim=True)


class Halves(nn.BatchNorm2d):
    """As AdvProp's: other samples are normalised together."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([super(Halves, self).forward(half) for half in input.tensor_split(2)])


class Counting(nn.BatchNorm2d):
    """Counts samples in place of batches."""

    def forward(self, input: Tensor) -> Tensor:
        self.num_batches_tracked += len(input)  # pyright: ignore[reportOperatorIssue]
        return super().forward(input)


class Masked(nn.BatchNorm2d):
    def forward(self, input: Tensor, mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().forward(input) * mask


class Linked(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.doubled = 2 * self.weight  # of a graph


class Pair(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.SyncBatchNorm(C), "its statistics are those of all processes"),
        (nn.LazyBatchNorm2d(), "it does not know its channels yet"),
        (ByHand(C), "what it computes for a sample depends on more than the n samples with it"),
        (Halves(C), "what it computes for a sample depends on more than the n samples with it"),
        (Counting(C), "its num_batches_tracked moves in a way of its own"),
        (Masked(C), r"in a trial its forward raises TypeError: .*missing 1 required positional argument: 'mask'"),
        (Linked(C), "it cannot be copied: RuntimeError"),
        (Pair(C), "its forward returns no tensor of as many samples"),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_is_not_proved_is_refused_by_name_with_a_way_out_and_nothing_changes(layer: nn.Module, reason: str):
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ModuleDict({"odd": layer}))
    with pytest.raises(ValueError, match=rf"^1\.odd is a {type(layer).__name__}, .*: {reason}; .*keep") as raised:
        convert_batchnorm(model, per_worker=N)
    assert "\n" not in str(raised.value)
    assert type(model[0]) is nn.BatchNorm2d
    assert model.get_submodule("1.odd") is layer


def test_a_trial_draws_no_numbers_of_the_users():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    convert_batchnorm(NormAct(C, nn.RReLU, drop=0.5), per_worker=N)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_trial_does_not_depend_on_the_users_defaults():
    try:
        torch.set_default_dtype(torch.float64)
        assert convert_batchnorm(NormAct(C), per_worker=N).weight.dtype == torch.float64
        torch.set_default_dtype(torch.float32)
        torch.set_default_device("meta")  # as "cuda", which a notebook may set once
        assert convert_batchnorm(NormAct(C), per_worker=N).weight.is_meta
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_a_layer_without_memory_is_converted():
    ghost = convert_batchnorm(NormAct(C, device="meta"), per_worker=N)
    assert ghost(torch.empty(2 * N, C, 3, 3, device="meta")).shape == (2 * N, C, 3, 3)

"""§2.3, eq 5-7: BatchNorm sees n samples, whatever the minibatch and wherever its workers run."""

from contextlib import nullcontext
from inspect import signature
from typing import Any

import pytest
import torch
from exactness import exact
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from onehour.rules.batchnorm import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    accumulate,
    convert_batchnorm,
    ghost_layers,
)

N, K, C = 4, 3, 5  # n, k and channels
KINDS = [
    pytest.param(GhostBatchNorm1d, nn.BatchNorm1d, (), id="1d"),
    pytest.param(GhostBatchNorm1d, nn.BatchNorm1d, (3,), id="1d-length"),
    pytest.param(GhostBatchNorm2d, nn.BatchNorm2d, (3, 2), id="2d"),
    pytest.param(GhostBatchNorm3d, nn.BatchNorm3d, (2, 3, 2), id="3d"),
]
STATISTICS = ("running_mean", "running_var")


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch whose workers' means differ, so that statistics over kn are not those over n."""
    shape = shape or (N * K, C, 3, 2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 2 + torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) % K).to(dtype)


def varied(layer: Any) -> Any:
    """`layer` in float64 with γ, β and running statistics that are not the defaults."""
    draw = torch.Generator().manual_seed(1)
    layer = layer.double()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=draw)
    return layer


def pairs(kind=GhostBatchNorm2d, torchs=nn.BatchNorm2d, workers: int = K, **options):
    """A ghost layer and k torch layers, one a worker, in the same state."""
    ghost = varied(kind(C, per_worker=N, **options))
    alone = [varied(torchs(C, **options)) for _ in range(workers)]
    for layer in alone:
        layer.load_state_dict(ghost.state_dict())
    return ghost, alone


def workers_of(x: Tensor, k: int = K) -> list[Tensor]:
    return [x[worker::k] for worker in range(k)]


def test_a_workers_output_is_equations_5_to_7():
    ghost, _ = pairs(eps=0.1)
    gamma, beta = ghost.weight[:, None, None], ghost.bias[:, None, None]
    for out, x in zip(workers_of(ghost(batch())), workers_of(batch()), strict=True):
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
        exact(out, gamma * (x - mean) / (variance + 0.1).sqrt() + beta)


@pytest.mark.parametrize(("kind", "torchs", "size"), KINDS)
@pytest.mark.parametrize("workers", [1, 2, K])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"eps": 0.1}], ids=str)
def test_outputs_and_gradients_equal_k_separate_passes_of_torch(kind, torchs, size, workers, options):
    if "bias" in options and "bias" not in signature(torchs).parameters:
        pytest.skip("this torch has no BatchNorm without bias")
    ghost, alone = pairs(kind, torchs, workers, **options)
    x, upstream = batch(N * workers, C, *size).requires_grad_(), batch(N * workers, C, *size, seed=2)
    (ghost(x) * upstream).sum().backward()
    ghost_gradient, x.grad = x.grad, None
    outputs = torch.empty_like(x)
    for worker, layer in enumerate(alone):
        out = layer(x[worker::workers])
        outputs[worker::workers] = out
        (out * upstream[worker::workers]).sum().backward()
    exact(ghost(x), outputs)
    exact(ghost_gradient, x.grad)
    for name, parameter in ghost.named_parameters():
        summed = torch.stack([layer.get_parameter(name).grad for layer in alone]).sum(0)
        exact(parameter.grad, summed)


@pytest.mark.parametrize("asked", [("weight", "bias"), ("x", "bias"), ("x", "weight"), ("x",)], ids=" ".join)
def test_gradients_do_not_depend_on_which_others_are_asked_for(asked):
    """Images need none, and γ or β may be frozen."""
    gradients = []
    for wanted in (("x", "weight", "bias"), asked):
        ghost, _ = pairs()
        tensors = {"x": batch(), **dict(ghost.named_parameters())}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in wanted)
        (ghost(tensors["x"]) * batch(seed=2)).sum().backward()
        gradients.append({name: tensor.grad for name, tensor in tensors.items()})
    exact([gradients[1][name] for name in asked], [gradients[0][name] for name in asked])
    assert all(gradients[1][name] is None for name in gradients[1].keys() - asked)


def test_one_batchnorm_over_all_of_kn_is_another_loss():
    ghost, (synchronised, *_) = pairs()
    assert (ghost(batch()) - synchronised(batch())).abs().max() > 0.1


def means_and_variances(parts: list[Tensor], correction: int = 1) -> tuple[Tensor, Tensor]:
    means = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    return means, torch.stack([part.var((0, 2, 3), correction=correction) for part in parts]).mean(0)


def moved(layer: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """The running statistics after one move towards these, keeping 0.9 of the old."""
    old = running(layer)
    return {name: 0.9 * old[name] + 0.1 * new for name, new in zip(STATISTICS, (mean, variance), strict=True)}


def state(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def running(layer: nn.Module) -> dict[str, Tensor]:
    return {name: state(layer)[name] for name in STATISTICS}


def differs(actual: dict[str, Tensor], other: dict[str, Tensor], name: str) -> bool:
    return bool((actual[name] - other[name]).abs().max() > 1e-3)


def test_running_statistics_move_once_by_the_mean_of_means_and_unbiased_variances():
    ghost, _ = pairs()
    expected = moved(ghost, *means_and_variances(workers_of(batch())))
    ghost(batch())
    exact(running(ghost), expected)
    assert int(ghost.num_batches_tracked) == 1


def test_other_running_statistics_differ():
    """Biased variances, the variance of all kn (SyncBN's), and k moves instead of one are each wrong."""
    (ghost, _), (often, _) = pairs(), pairs()
    biased = moved(ghost, *means_and_variances(workers_of(batch()), correction=0))
    pooled = moved(ghost, *means_and_variances([batch()]))
    for rows in workers_of(batch()):
        often(rows)  # without accumulate
    ghost(batch())
    assert differs(running(ghost), biased, "running_var")
    assert differs(running(ghost), pooled, "running_var")
    assert all(differs(running(ghost), running(often), name) for name in STATISTICS)
    assert (int(ghost.num_batches_tracked), int(often.num_batches_tracked)) == (1, K)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0, None])
def test_running_statistics_of_one_worker_are_torchs_at_every_momentum(momentum):
    ghost, (layer,) = pairs(workers=1, momentum=momentum)
    for seed in range(4):
        for one in (ghost, layer):
            one(batch(N, C, 3, 2, seed=seed))
    exact(ghost.state_dict(), layer.state_dict())


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("passes", [(1, 1, 1), (2, 1), (3,)])
def test_several_passes_of_one_iteration_equal_one_pass_of_all_workers(passes, momentum):
    (fused, _), (split, _) = pairs(momentum=momentum), pairs(momentum=momentum)
    for seed in range(2):
        fused(batch(seed=seed))
        with accumulate(nn.Sequential(split)):
            before = running(split)
            for share in torch.stack(workers_of(batch(seed=seed)), dim=1).split(passes, dim=1):
                split(share.flatten(0, 1))
            exact(running(split), before)
    exact(split.state_dict(), fused.state_dict())


def test_many_workers_of_a_model_in_bfloat16_are_all_counted():
    ghost = GhostBatchNorm1d(C, per_worker=2, momentum=1.0, dtype=torch.bfloat16)
    with accumulate(ghost):
        for mean in [0] * 300 + [2] * 300:
            ghost(torch.tensor([[mean - 1], [mean + 1]], dtype=torch.bfloat16).expand(2, C))
    assert [ghost.get_buffer(name).tolist() for name in STATISTICS] == [[1] * C, [2] * C]


def test_a_block_that_raises_or_trains_nothing_leaves_the_statistics_and_the_model_usable():
    ghost, _ = pairs()
    before = state(ghost)
    with pytest.raises(ValueError, match="a batch of 1"), accumulate(ghost):
        ghost(ghost(batch())[:1])
    exact(ghost.state_dict(), before)
    with accumulate(ghost):
        ghost.eval()(batch())
    exact(ghost.state_dict(), before)
    with accumulate(ghost):
        ghost.train()(batch())
    exact(running(ghost), moved(varied(nn.BatchNorm2d(C)), *means_and_variances(workers_of(batch()))))


def test_a_model_that_is_not_converted_is_refused_since_its_statistics_would_move_once_a_pass():
    with pytest.raises(ValueError, match=r"call convert_batchnorm\(model, per_worker\) first"):
        accumulate(nn.Sequential(nn.BatchNorm1d(C))).__enter__()
    for without in (nn.Linear(C, C), nn.BatchNorm1d(C, track_running_stats=False)):
        with accumulate(without):
            pass


def test_nested_blocks_are_refused_and_the_outer_one_still_counts():
    ghost, _ = pairs()
    with accumulate(ghost):
        ghost(batch())
        with pytest.raises(ValueError, match="already active"), accumulate(ghost):
            pass
        ghost(batch())
    assert int(ghost.num_batches_tracked) == 1


@pytest.mark.parametrize(("kind", "torchs", "size"), KINDS)
def test_evaluation_is_torchs_for_any_batch(kind, torchs, size):
    ghost, (layer, *_) = pairs(kind, torchs)
    before = state(ghost)
    for rows in (1, N, N * K + 1):
        x = batch(rows, C, *size)
        exact(ghost.eval()(x), layer.eval()(x))
    exact(ghost.state_dict(), before)


def test_state_dicts_have_torchs_keys_and_load_both_ways():
    ghost, layer = varied(GhostBatchNorm2d(C, per_worker=N)), nn.BatchNorm2d(C).double()
    assert list(ghost.state_dict()) == list(layer.state_dict())
    layer.load_state_dict(ghost.state_dict())
    back = GhostBatchNorm2d(C, per_worker=N).double()
    back.load_state_dict(layer.state_dict())
    exact(back.state_dict(), ghost.state_dict())


@pytest.mark.parametrize(("kind", "torchs", "size"), KINDS)
def test_the_number_of_channels_has_torchs_name_and_place(kind, torchs, size):
    assert next(iter(signature(kind).parameters)) == next(iter(signature(torchs).parameters)) == "num_features"
    assert kind(num_features=C, per_worker=N).num_features == kind(C, per_worker=N).num_features == C


@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_running_statistics_workers_are_still_normalised_alone(dtype, options):
    """bfloat16 activations with float32 parameters are what autocast gives, and torch's own layer takes."""
    ghost = GhostBatchNorm2d(C, per_worker=N, track_running_stats=False, **options)
    layer = nn.BatchNorm2d(C, track_running_stats=False, **options)
    if dtype == torch.float64:
        ghost, layer = ghost.double(), layer.double()
    x = batch(dtype=dtype)
    assert ghost.running_mean is None
    assert ghost_layers(ghost) == []
    for out, rows in zip(workers_of(ghost(x)), workers_of(x), strict=True):
        # bfloat16 keeps 8 bits, so that one rounding of values below 8 moves them by 2^-5
        torch.testing.assert_close(out, layer(rows), rtol=0, atol=2**-5 if dtype == torch.bfloat16 else 1e-12)


@pytest.mark.parametrize("rows", [0, 1, N - 1, N + 1, N * K - 1])
def test_a_batch_that_is_no_whole_number_of_workers_is_refused(rows):
    ghost, _ = pairs()
    before = state(ghost)
    with pytest.raises(ValueError, match=f"a batch of {rows} is not a whole number of workers of per_worker={N}"):
        ghost(torch.zeros(rows, C, 3, 2, dtype=torch.float64))
    exact(ghost.state_dict(), before)


@pytest.mark.parametrize(
    ("kind", "shape", "told"),
    [
        (GhostBatchNorm2d, (N, C), "expected 4D input"),
        (GhostBatchNorm1d, (N, C), "more than 1 value per channel"),  # of n = 1
    ],
)
def test_a_batch_that_torch_refuses_is_refused_as_by_torch(kind, shape, told):
    with pytest.raises(ValueError, match=told):
        kind(C, per_worker=1)(torch.zeros(shape))


def test_channels_last_gives_the_same_numbers():
    (ghost, _), (other, _) = pairs(), pairs()
    x, y = batch().requires_grad_(), batch().contiguous(memory_format=torch.channels_last).requires_grad_()
    for layer, taken in ((ghost, x), (other, y)):
        (layer(taken) * batch(seed=2)).sum().backward()
    exact(x.grad, y.grad)
    exact(ghost.state_dict(), other.state_dict())
    exact(ghost(x), other(y))


class Watched(TorchDispatchMode):
    """Keeps the input of every native forward BatchNorm."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "batch_norm" in str(func) and "backward" not in str(func):
            self.taken = [*getattr(self, "taken", []), (args[0].shape, args[0].data_ptr())]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "torchs", "size"), KINDS)
def test_a_contiguous_batch_is_viewed_and_not_copied(kind, torchs, size):
    """All g workers go to one native call, whose input is the batch's own memory."""
    ghost, _ = pairs(kind, torchs)
    x = batch(N * K, C, *size)
    with Watched() as watched:
        ghost(x)
    assert watched.taken == [((N, K * C, *size), x.data_ptr())]


def test_conversion_shares_parameters_and_buffers_and_keeps_settings():
    inner = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C, eps=0.1, momentum=0.3))
    model = varied(nn.Sequential(inner, nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(4 * C, affine=False)))
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    model[3].eval()
    assert convert_batchnorm(model, per_worker=N) is model
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert [type(m).__name__ for m in ghost_layers(model)] == ["GhostBatchNorm2d", "GhostBatchNorm1d"]
    settings = [(m.per_worker, m.eps, m.momentum, m.affine) for m in ghost_layers(model)]
    assert settings == [(N, 0.1, 0.3, True), (N, 1e-5, 0.1, False)]
    assert [layer.training for layer in ghost_layers(model)] == [True, False]
    number: Any = torch.tensor(2)
    convert_batchnorm(model, per_worker=number)
    assert [repr(layer.per_worker) for layer in ghost_layers(model)] == ["2", "2"]
    with pytest.raises(ValueError, match="2 is a SyncBatchNorm"):
        convert_batchnorm(nn.Sequential(nn.ReLU(), model, nn.SyncBatchNorm(C)), per_worker=N)
    assert [layer.per_worker for layer in ghost_layers(model)] == [2, 2], "what is refused changes nothing"


@pytest.mark.parametrize("nested", [False, True])
def test_a_batchnorm_that_a_model_uses_twice_is_converted_everywhere(nested):
    layer = nn.BatchNorm2d(C)
    model = nn.Sequential(layer, nn.Sequential(layer) if nested else layer)
    convert_batchnorm(model, per_worker=N)
    assert isinstance(model[0], GhostBatchNorm2d)
    assert (model[1][0] if nested else model[1]) is model[0]  # type: ignore[index]


def test_a_bare_batchnorm_is_converted_to_what_is_returned():
    assert isinstance(convert_batchnorm(nn.BatchNorm2d(C), per_worker=N), GhostBatchNorm2d)


SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def weighted(shares: Tensor) -> list[Tensor]:
    """Σ of the workers' means and of their unbiased variances by their shares, over the sum of the shares."""
    workers, axes = workers_of(batch()), (0, 2, 3)
    parts = [torch.stack([one.mean(axes) for one in workers]), torch.stack([one.var(axes) for one in workers])]
    return [(shares[:, None] * part).sum(0) / shares.sum() for part in parts]


@pytest.mark.parametrize("passes", [None, (1, 1, 1), (2, 1), (1, 2), (3,)])
@pytest.mark.parametrize("shares", [SHARES, 7 * SHARES, torch.eye(K, 1).view(-1).double(), torch.ones(K).double() / 3])
def test_statistics_move_by_the_workers_shares_whatever_they_sum_to(passes: tuple[int, ...] | None, shares: Tensor):
    (ghost, _), first = pairs(), 0
    expected = moved(ghost, *weighted(shares))
    with accumulate(ghost) if passes else nullcontext():
        for g in passes or (K,):
            ghost.shares = shares[first : first + g]
            ghost(torch.stack(workers_of(batch())[first : first + g], 1).flatten(0, 1))
            first += g
    exact(running(ghost), expected)
    assert int(ghost.num_batches_tracked) == 1


def test_a_single_worker_is_all_there_is_whatever_its_share():
    (given, _), (none, _) = pairs(), pairs()
    given.shares = SHARES[:1]
    for layer in (given, none):
        layer(batch()[:N])
    exact(running(given), running(none))


def test_what_a_worker_computes_does_not_know_of_the_shares_nor_does_an_evaluation():
    results = []
    for shares in (SHARES, None):
        (ghost, _), x = pairs(), batch().requires_grad_()
        ghost.shares = shares
        evaluated = ghost.eval()(batch())
        (ghost.train()(x) * batch(seed=1)).sum().backward()
        results.append([evaluated, ghost(batch()), x.grad, ghost.weight.grad, ghost.bias.grad])
    exact(*results)

"""BatchNorm over n samples, whatever the minibatch and wherever its workers run (paper §2.3, eq 5-7).

The loss of a sample depends on the n samples it is normalised with, so n is part of the loss: it stays when k
changes. A pass over g workers takes a batch (g·n, C, H, W) in which worker j owns the rows j, j + g, j + 2g …, so
that it views as (n, g·C, H, W) without a copy and one native call normalises each worker by itself. On a GPU a batch
that is channels_last goes through `onehour.rules.kernels`, which also take the ReLU that follows, and a shortcut.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from onehour.rules.arguments import positive_int

__all__ = [
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "accumulate",
    "batchnorm_relu",
    "convert_batchnorm",
    "ghost_layers",
    "kernels_take",
]


class _Ghost(_BatchNorm):
    """What the ghost layers of every dimension share; see `GhostBatchNorm2d`."""

    per_worker: int
    sums: tuple[Tensor, Tensor] | None = None
    """While an iteration takes several passes: Σ of the workers' (means, unbiased variances) and their count."""

    seen: list[tuple[nn.Module, Tensor]] | None = None
    """In place of `sums`: where forwards leave their (2, g, C), to be added for all layers at once."""

    shares: Tensor | None = None
    """How much each of a pass's workers counts in `sums`, (g,); None for all alike, as it should be."""

    repeated: tuple[Tensor, Tensor] | None = None
    """γ and β repeated for the workers of a pass, where `repeat_parameters` has done it for all layers at once."""

    def __init__(self, num_features: int, *, per_worker: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.per_worker = positive_int("per_worker", per_worker)

    def forward(self, input: Tensor, shortcut: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """The normalised batch; with the shortcut added and a ReLU applied, where asked for."""
        if not self.training:
            return _finish(super().forward(input), shortcut, relu)
        self._check_input_dim(input)
        n, c = self.per_worker, self.num_features
        g, remainder = input.shape[0] // n, input.shape[0] % n  # torch.compile cannot trace divmod
        if remainder or g == 0:
            raise ValueError(
                f"a batch of {input.shape[0]} is no whole number of workers of per_worker={n} samples;"
                " give full batches (a StreamBatchSampler does, or drop_last=True) or another per_worker"
            )
        both = (self.weight is None) == (self.bias is None)
        if kernels_take(input) and _is_like(shortcut, input) and both and input[0, 0].numel() * n > 1:
            from onehour.rules.kernels import Ghost  # needs triton

            output, statistics = Ghost.apply(input, self.weight, self.bias, shortcut, n, self.eps, relu)
            if self.track_running_stats:
                self._keep(statistics)
            return output
        # Two rows that the native call, with momentum 1, fills with the batch's own means and unbiased variances, in
        # the type of γ (or of the running statistics), which mixed precision keeps wider than the input's.
        own = self.weight if self.weight is not None else self.running_mean
        statistics = torch.zeros(2, g * c, dtype=input.dtype if own is None else own.dtype, device=input.device)
        means, variances = statistics
        if g == 1:
            output = F.batch_norm(input, means, variances, self.weight, self.bias, True, 1.0, self.eps)
        else:
            gamma, beta = self.repeated or (p if p is None else p.repeat(g) for p in (self.weight, self.bias))
            viewed = input.reshape(n, g * c, *input.shape[2:])
            output = F.batch_norm(viewed, means, variances, gamma, beta, True, 1.0, self.eps)
            # Not a view to autograd, so that an in-place ReLU may follow cheaply; nobody else holds the memory.
            output = _UNSAFE_VIEW(output, input.shape)
        if self.track_running_stats:
            self._keep(statistics.view(2, g, c))
        return _finish(output, shortcut, relu)

    def _keep(self, by_worker: Tensor) -> None:
        if self.seen is not None:
            self.seen.append((self, by_worker))
            return
        workers: Any = by_worker.shape[1]
        if self.shares is not None:
            by_worker, workers = by_worker * self.shares[:, None], self.shares.sum()
        statistics = by_worker[:, 0] if by_worker.shape[1] == 1 else by_worker.sum(1)
        if self.sums is None:
            self.commit(statistics[0] / workers, statistics[1] / workers)
            return
        total, count = self.sums
        total.add_(statistics)
        count.add_(workers)

    @torch.no_grad()
    def commit(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics once, by the mean over all k workers' means and unbiased variances."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, per_worker={getattr(self, 'per_worker', None)}"


_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default


def _finish(output: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    if shortcut is not None:
        output = output.add_(shortcut)
    return F.relu(output, inplace=True) if relu else output


def batchnorm_relu(layer: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """max(BN(x) + shortcut, 0): for a model of one's own, in one pass over memory where the layer is a ghost on a GPU.

    >>> layer = convert_batchnorm(nn.BatchNorm2d(3), per_worker=4)
    >>> batchnorm_relu(layer, torch.randn(8, 3, 5, 5)).min()
    tensor(0., grad_fn=<MinBackward1>)
    """
    if isinstance(layer, _Ghost):
        return layer(x, shortcut, relu=True)
    return _finish(layer(x), shortcut, relu=True)


class _Sequence(nn.Sequential):
    """A Sequential whose ghosts apply the ReLU that comes next: called as a whole, nothing can lie between the two."""

    def forward(self, input: Tensor) -> Tensor:
        layers = list(self)
        for number, layer in enumerate(layers):
            before, after = layers[number - 1 : number], layers[number + 1 : number + 2]
            if type(layer) is nn.ReLU and any(_is_pair(other, layer) for other in before):
                continue
            relu = any(_is_pair(layer, other) for other in after)
            input = layer(input, relu=True) if relu else layer(input)
        return input


def _is_pair(layer: nn.Module, after: nn.Module) -> bool:
    return (
        isinstance(layer, _Ghost)
        and type(after) is nn.ReLU
        and not (layer._forward_hooks or layer._backward_hooks or after._forward_pre_hooks or after._forward_hooks)
        and not (layer._backward_pre_hooks or after._backward_hooks or after._backward_pre_hooks)
    )


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernels_take(x: Tensor) -> bool:
    """Whether a batch lies as the Triton kernels expect: on a GPU, channels_last, in float32 or less."""
    return (
        _HAS_TRITON
        and x.is_cuda
        and x.ndim == 4
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _is_like(shortcut: Tensor | None, x: Tensor) -> bool:
    if shortcut is None:
        return True
    return shortcut.dtype == x.dtype and shortcut.shape == x.shape and shortcut.stride() == x.stride()


class GhostBatchNorm2d(_Ghost, nn.BatchNorm2d):
    """BatchNorm over groups of n = `per_worker` samples (eq 5-7), with `torch.nn.BatchNorm2d`'s state-dict keys.

    In training a batch of g·n samples is g workers: rows j, j + g, j + 2g … belong to worker j. Each is normalised by
    itself. One forward is one iteration: the running statistics move once, by the mean over the g workers' means and
    unbiased variances. For an iteration of several passes, see `accumulate`. Evaluation is `BatchNorm2d`'s.

    Args:
        num_features: C.
        per_worker: n.
        eps, momentum, affine, track_running_stats: as in torch, whose momentum 0.1 keeps 0.9 of the old value.

    Shape:
        (g·n, C, H, W) → the same.

    Raises:
        ValueError: for a training batch that is no multiple of n.

    >>> layer = GhostBatchNorm2d(3, per_worker=4)
    >>> layer(torch.randn(8, 3, 5, 5)).shape
    torch.Size([8, 3, 5, 5])
    """


class GhostBatchNorm1d(_Ghost, nn.BatchNorm1d):
    """As `GhostBatchNorm2d`, for (g·n, C) or (g·n, C, L).

    >>> GhostBatchNorm1d(3, per_worker=4)(torch.randn(8, 3)).shape
    torch.Size([8, 3])
    """


class GhostBatchNorm3d(_Ghost, nn.BatchNorm3d):
    """As `GhostBatchNorm2d`, for (g·n, C, D, H, W).

    >>> GhostBatchNorm3d(3, per_worker=2)(torch.randn(4, 3, 2, 2, 2)).shape
    torch.Size([4, 3, 2, 2, 2])
    """


GHOSTS: dict[type[nn.Module], type[_Ghost]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
    nn.BatchNorm3d: GhostBatchNorm3d,
}


def convert_batchnorm(model: nn.Module, per_worker: int) -> nn.Module:
    """Replace every BatchNorm of a model by its ghost, which shares the parameters and buffers (§2.3).

    Args:
        model: changed in place, unless it is itself a BatchNorm.
        per_worker: n of the recipe whose accuracy is to be kept.

    Returns:
        The model.

    Raises:
        ValueError: for a BatchNorm that this cannot convert: synchronised, lazy, or of a class of its own.

    >>> model = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), per_worker=32)
    >>> type(model[0]).__name__, model[0].per_worker
    ('GhostBatchNorm2d', 32)
    """
    positive_int("per_worker", per_worker)
    replaced = {id(module): _converted(name, module, per_worker) for name, module in _batchnorms(model)}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children leaves out a module's second name
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
                if type(parent) is nn.Sequential:
                    parent.__class__ = _Sequence
    return replaced.get(id(model), model)


def ghost_layers(model: nn.Module) -> list[_Ghost]:
    """The model's ghost layers that keep running statistics, in the order of its modules."""
    return [m for m in model.modules() if isinstance(m, _Ghost) and m.track_running_stats]


def repeat_parameters(layers: list[_Ghost], g: int) -> None:
    """Repeat γ and β of all layers for a pass over g workers, layers of equal width together.

    One operation a width in place of two a layer: for small models those cost as much as the normalisation. Must be
    called anew for every pass; g = 1 needs none, and forgets the last.
    """
    widths: dict[int, list[_Ghost]] = {}
    for layer in layers:
        layer.repeated = None
        if g > 1 and layer.weight is not None and layer.bias is not None:
            widths.setdefault(layer.num_features, []).append(layer)
    for alike in widths.values():
        rows = torch.stack([p for layer in alike for p in (layer.weight, layer.bias)]).repeat(1, g).unbind()
        for number, layer in enumerate(alike):
            layer.repeated = rows[2 * number], rows[2 * number + 1]


@contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """Several passes, one iteration: the running statistics move once, on exit, by the mean over all workers seen.

    Without it, gradient accumulation would move them once a pass. If the block raises, they stay.

    >>> model = GhostBatchNorm2d(3, per_worker=4)
    >>> with accumulate(model):
    ...     _ = model(torch.randn(4, 3, 2, 2)), model(torch.randn(4, 3, 2, 2))
    >>> int(model.num_batches_tracked)
    1
    """
    layers = ghost_layers(model)
    if any(layer.sums is not None for layer in layers):
        raise ValueError("accumulate(model) is already active for this model; use one block an iteration")
    for layer in layers:
        assert layer.running_mean is not None
        zeros = layer.running_mean.new_zeros
        layer.sums = (zeros(2, layer.num_features), zeros(1))
    try:
        yield
        for layer in layers:
            assert layer.sums is not None
            total, count = layer.sums
            if count:
                layer.commit(*(total / count))
    finally:
        for layer in layers:
            layer.sums = None


def _batchnorms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def _converted(name: str, module: _BatchNorm, per_worker: int) -> _Ghost:
    if isinstance(module, _Ghost):
        module.per_worker = per_worker
        return module
    if type(module) not in GHOSTS:
        raise ValueError(
            f"{name or 'the model'} is a {type(module).__name__}, which cannot be given groups of n;"
            " use torch.nn.BatchNorm1d, 2d or 3d there"
        )
    ghost = GHOSTS[type(module)](
        module.num_features,
        per_worker=per_worker,
        eps=module.eps,
        momentum=module.momentum,
        affine=module.affine,
        track_running_stats=module.track_running_stats,
    )
    ghost.weight, ghost.bias = module.weight, module.bias
    ghost.running_mean, ghost.running_var = module.running_mean, module.running_var
    ghost.num_batches_tracked = module.num_batches_tracked
    ghost.train(module.training)
    return ghost

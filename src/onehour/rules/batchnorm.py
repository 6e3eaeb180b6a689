"""BatchNorm over n samples, whatever the minibatch and wherever its workers run (paper §2.3, eq 5-7).

The loss of a sample depends on the n samples it is normalised with, so n is part of the loss: it stays when k
changes. A pass over g workers takes a batch (g·n, C, H, W) in which worker j owns the rows j, j + g, j + 2g …, so
that it views as (n, g·C, H, W) without a copy and one native call normalises each worker by itself. On a GPU a batch
that is channels_last goes through `onehour.rules.kernels`, which also take the ReLU that follows, and a shortcut.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from onehour.rules.arguments import positive_int
from onehour.rules.trial import SAMPLES, batch_for, varied, why_not_alone

__all__ = ["GhostBatchNorm1d", "GhostBatchNorm2d", "GhostBatchNorm3d", "accumulate", "convert_batchnorm"]


class _Ghost(_BatchNorm):
    """What the ghost layers of every dimension share; see `GhostBatchNorm2d`."""

    per_worker: int
    sums: tuple[Tensor, Tensor] | None = None
    """While an iteration takes several passes: Σ of the workers' (means, unbiased variances) and their count."""

    seen: list[tuple[nn.Module, Tensor]] | None = None
    """In place of `sums`: where forwards leave their (2, g, C), to be added for all layers at once."""

    places: dict[nn.Module, tuple[Tensor, Tensor]] | None = None
    """In place of `seen`: zeros, (g·C,) each, which a layer's first forward takes for its means and variances."""

    shares: Tensor | None = None
    """How much each of a pass's workers counts in `sums`, (g,); None for all alike, as it should be."""

    repeated: Mapping[nn.Module, tuple[Tensor, Tensor]] | None = None
    """Where a trainer keeps γ and β for the workers of a pass."""

    def __init__(self, num_features: int, *, per_worker: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.per_worker = positive_int("per_worker", per_worker)

    def forward(self, input: Tensor, shortcut: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """The normalised batch; with the shortcut added and a ReLU applied, where asked for."""
        if not self.training:
            return _finish(super().forward(input), shortcut, relu)
        self._check_input_dim(input)
        output, statistics = self._normalised(input, self.weight, self.bias, self.eps, shortcut, relu=relu)
        if self.track_running_stats:
            self._keep(statistics)
        return output

    def _normalised(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        shortcut: Tensor | None = None,
        *,
        relu: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """A training batch, and its workers' means and unbiased variances, (2, g, C); None where `places` has them."""
        n, c = self.per_worker, self.num_features
        g, remainder = input.shape[0] // n, input.shape[0] % n  # torch.compile cannot trace divmod
        if remainder or g == 0:
            raise ValueError(
                f"a batch of {input.shape[0]} is not a whole number of workers of per_worker={n} samples;"
                " give full batches (a StreamBatchSampler does, or drop_last=True) or another per_worker"
            )
        both = (weight is None) == (bias is None)
        if kernels_take(input) and _is_like(shortcut, input) and both and input[0, 0].numel() * n > 1:
            from onehour.rules.kernels import Ghost  # needs triton

            return Ghost.apply(input, weight, bias, shortcut, n, eps, relu)
        # Two rows that the native call, with momentum 1, fills with the batch's own means and unbiased variances, in
        # the type of γ (or of the running statistics), which mixed precision keeps wider than the input's.
        statistics, place = None, self.places.pop(self, None) if self.places else None
        if place is not None and len(place[0]) == g * c:
            means, variances = place
        else:
            own = weight if weight is not None else self.running_mean
            statistics = torch.zeros(2, g * c, dtype=input.dtype if own is None else own.dtype, device=input.device)
            means, variances = statistics.unbind()  # a tensor's own iterator takes twice as long
        if g == 1:
            output = F.batch_norm(input, means, variances, weight, bias, True, 1.0, eps)
        else:
            repeated = None
            if self.repeated and weight is self.weight and bias is self.bias:
                repeated = self.repeated.get(self)
            gamma, beta = repeated or (p if p is None else p.repeat(g) for p in (weight, bias))
            viewed = input.reshape(n, g * c, *input.shape[2:])
            output = F.batch_norm(viewed, means, variances, gamma, beta, True, 1.0, eps)
            # Not a view to autograd, so that an in-place ReLU may follow cheaply; nobody else holds the memory.
            output = _UNSAFE_VIEW(output, tuple(input.shape))
        return _finish(output, shortcut, relu), None if statistics is None else statistics.view(2, g, c)

    def _keep(self, by_worker: Tensor | None) -> None:
        if by_worker is None:
            return
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
    if _takes_relu(layer):
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
        _takes_relu(layer)
        and type(after) is nn.ReLU
        and not (layer._forward_hooks or layer._backward_hooks or after._forward_pre_hooks or after._forward_hooks)
        and not (layer._backward_pre_hooks or after._backward_hooks or after._backward_pre_hooks)
    )


def _takes_relu(layer: nn.Module) -> TypeGuard[_Ghost]:
    return isinstance(layer, _Ghost) and not isinstance(layer, _GhostOfSubclass)


def _has_hooks(module: nn.Module) -> bool:
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks)


_HAS_TRITON = importlib.util.find_spec("triton") is not None


def kernels_take(x: Tensor) -> bool:
    """Whether a batch lies as the Triton kernels expect: on the current GPU, channels_last, in float32 or less."""
    return (
        _HAS_TRITON
        and x.is_cuda
        and x.ndim == 4
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.device.index == torch.cuda.current_device()  # where Triton launches, wherever its tensors lie
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
        ValueError: for a training batch that is not a multiple of n.

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


class _GhostOfSubclass(_Ghost):
    """A class of someone's own that normalises and then does more: its forward is its own, but for `F.batch_norm`."""

    is_relu = False
    """Whether all it does more is a ReLU, which the kernels apply in the same pass."""

    def forward(self, *given: Any, **options: Any) -> Tensor:
        """What the class itself returns for each worker's samples."""
        own = super(_Ghost, self).forward
        if not self.training:
            return own(*given, **options)
        alone = len(given) == 1 and not options  # as in its trial
        if self.is_relu and alone and kernels_take(given[0]) and not any(map(_has_hooks, self.children())):
            return super().forward(given[0], relu=True)
        tracks, self.track_running_stats = self.track_running_stats, False  # so that it counts no batch
        try:
            with _InGroups(self, tracks=tracks):
                return own(*given, **options)
        finally:
            self.track_running_stats = tracks

    def __reduce__(self) -> Any:  # its class has no place in a module that pickle could find
        return _blank, (type(self).__bases__[1],), self.__getstate__()


class _InGroups(TorchFunctionMode):
    """Within it, `F.batch_norm` of a training batch is over a layer's groups of n."""

    def __init__(self, layer: _Ghost, *, tracks: bool) -> None:
        super().__init__()
        self.layer, self.tracks = layer, tracks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._batch_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        output, statistics = self.layer._normalised(input, weight, bias, eps)
        if self.tracks:
            self.layer._keep(statistics)
        return output


@cache
def _subclass_of(own: type[_BatchNorm]) -> type[_Ghost]:
    return type(f"Ghost{own.__name__}", (_GhostOfSubclass, own), {"__module__": own.__module__})


def _blank(own: type[_BatchNorm]) -> _Ghost:
    return object.__new__(_subclass_of(own))


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

    A class of your own that normalises and then does more, such as timm's BatchNormAct2d, keeps its forward; only its
    call of `torch.nn.functional.batch_norm` is over groups of n. A trial on a copy checks that each worker then gets
    what it would get alone.

    Returns:
        The model.

    Raises:
        ValueError: for a BatchNorm that this cannot convert: synchronised, lazy, or of a class of its own that does
            something else.

    >>> model = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), per_worker=32)
    >>> type(model[0]).__name__, model[0].per_worker
    ('GhostBatchNorm2d', 32)
    """
    per_worker = positive_int("per_worker", per_worker)
    replaced = {id(module): _converted(name, module, per_worker) for name, module in _batchnorms(model)}
    for ghost in replaced.values():
        ghost.per_worker = per_worker
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
    if not layers and any(layer.track_running_stats for _, layer in _batchnorms(model)):
        raise ValueError("accumulate(model) is for converted layers; call convert_batchnorm(model, per_worker) first")
    for layer in layers:
        assert layer.running_mean is not None
        dtype = torch.promote_types(layer.running_mean.dtype, torch.float32)  # bfloat16 counts to 256
        zeros = layer.running_mean.to(dtype).new_zeros
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
        return module
    ghost = _as_ghost(module, per_worker)
    if isinstance(ghost, _GhostOfSubclass):
        reason, ghost.is_relu = _tried(module)
        if reason:
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, which cannot be given groups of n: {reason}; use"
                " torch.nn.BatchNorm1d, 2d or 3d there, or leave all as they are (--batchnorm keep)"
            )
    return ghost


def _as_ghost(module: _BatchNorm, per_worker: int) -> _Ghost:
    """What shares all that a module holds, its hooks too, but no forward that someone has put in its place."""
    ghost = object.__new__(GHOSTS.get(type(module)) or _subclass_of(type(module)))
    vars(ghost).update({**vars(module), "per_worker": per_worker, "_compiled_call_impl": None})
    vars(ghost).pop("forward", None)
    return ghost


def _tried(module: _BatchNorm) -> tuple[str, bool]:
    """Why someone's class cannot be converted, empty if it can; and whether it is BatchNorm and a ReLU alone."""
    if isinstance(module, nn.SyncBatchNorm):
        return "its statistics are those of all processes", False
    if isinstance(module, LazyModuleMixin):
        return "it does not know its channels yet", False
    try:
        own = varied(module)
        ghost, x = _as_ghost(copy.deepcopy(own), SAMPLES), batch_for(own)
    except Exception as error:
        return f"it cannot be copied: {type(error).__name__}", False
    reason = why_not_alone(own, ghost, x)
    if reason or [type(child) for child in own.children() if type(child) is not nn.Identity] != [nn.ReLU]:
        return reason, False
    rectified, _ = ghost._normalised(x, own.weight, own.bias, own.eps, relu=True)
    return "", torch.equal(ghost(x), rectified)

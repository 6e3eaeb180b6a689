"""Ghost BatchNorm, ReLU and a residual's addition in one pass over NHWC memory: Triton kernels (paper §2.3, eq 5-7).

A sample is HW·C numbers that lie together, so the rows j, j + g, j + 2g … of worker j are n blocks of memory, and all g
workers of a pass are normalised by the same two launches forward and two backward. Each value is read twice forward and
written once; backward likewise, with the ReLU's mask computed anew in place of being stored:

    x̂ = (x - μ_j)/√(σ_j² + ε)        y = max(γx̂ + β + r, 0)
    ∂L/∂x = γ/√(σ_j² + ε) · (d - Σd/m - x̂ Σ(d x̂)/m)        d = ∂L/∂y where y > 0, and ∂L/∂r = d

Σ runs over the m = n·HW values of a channel in worker j; ∂L/∂β = Σ_j Σd and ∂L/∂γ = Σ_j Σ(d x̂). All sums are float32
and added in an order that the shapes alone decide: no atomics. The second reading begins where the first one ended,
with what the cache still holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

SPLIT = 64
"""Into how many parts a worker's rows may be cut; their sums lie in one tile when they are added."""

WARPS = 4
"""That share a tile."""


@triton.jit
def _places(r, c, j, pixels, channels, workers):
    """Where the rows r of worker j lie, and their channels c: its i-th sample is row i·g + j of the batch."""
    return ((r // pixels * workers + j) * pixels + r % pixels).to(tl.int64)[:, None] * channels + c[None, :]


@triton.jit
def _affine(inverse, gamma, beta, c, ok, affine: tl.constexpr):
    """By what x - μ is multiplied, and what is added to it."""
    scale = inverse
    shift = tl.zeros_like(inverse)
    if affine:
        scale *= tl.load(gamma + c, mask=ok, other=0.0).to(tl.float32)
        shift = tl.load(beta + c, mask=ok, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def _moments(x, partial, m, pixels, channels, workers, split: tl.constexpr, high: tl.constexpr, wide: tl.constexpr):
    """Mean and Σ(x - mean)² of a part of a worker's rows, by Welford's update in every place of the tile."""
    c = tl.program_id(0) * wide + tl.arange(0, wide)
    part, j = tl.program_id(1), tl.program_id(2)
    rows = tl.cdiv(m, split)
    first = part * rows
    last = tl.minimum(first + rows, m)
    mean = tl.zeros((high, wide), tl.float32)
    square = tl.zeros((high, wide), tl.float32)
    seen = tl.zeros((high,), tl.float32)
    for start in range(first, last, high):
        r = start + tl.arange(0, high)
        inside = r < last
        at = _places(r, c, j, pixels, channels, workers)
        mask = inside[:, None] & (c < channels)[None, :]
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        seen += tl.where(inside, 1.0, 0.0)
        share = tl.where(inside, 1.0 / tl.maximum(seen, 1.0), 0.0)
        delta = v - mean
        step = delta * share[:, None]
        mean += step
        square += tl.where(inside[:, None], delta * (delta - step), 0.0)
    count = tl.sum(seen, 0)
    total = tl.sum(mean * seen[:, None], 0) / tl.maximum(count, 1.0)
    apart = mean - total[None, :]
    square = tl.sum(square + apart * apart * seen[:, None], 0)
    place = partial + ((part * workers + j) * 2) * channels + c
    tl.store(place, total, mask=c < channels)
    tl.store(place + channels, square, mask=c < channels)


@triton.jit
def _together(partial, m, j, c, channels, workers, split: tl.constexpr):
    """A worker's mean and Σ(x - mean)² from those of its parts (Chan's formula)."""
    part = tl.arange(0, split)
    rows = tl.cdiv(m, split)
    count = tl.maximum(tl.minimum(m - part * rows, rows), 0).to(tl.float32)
    place = partial + ((part[:, None] * workers + j) * 2) * channels + c[None, :]
    mask = (count > 0)[:, None] & (c < channels)[None, :]
    means = tl.load(place, mask=mask, other=0.0)
    squares = tl.load(place + channels, mask=mask, other=0.0)
    mean = tl.sum(means * count[:, None], 0) / m
    apart = tl.where(mask, means - mean[None, :], 0.0)
    return mean, tl.sum(squares + apart * apart * count[:, None], 0)


@triton.jit
def _normalise(
    x, residual, y, partial, gamma, beta, statistics, m, pixels, channels, workers, eps,
    split: tl.constexpr, relu: tl.constexpr, adds: tl.constexpr, affine: tl.constexpr,
    high: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """y, and the worker's mean and unbiased variance."""
    c = tl.program_id(0) * wide + tl.arange(0, wide)
    part, j = tl.program_id(1), tl.program_id(2)
    ok = c < channels
    mean, square = _together(partial, m, j, c, channels, workers, split)
    if part == 0:
        tl.store(statistics + j * channels + c, mean, mask=ok)
        tl.store(statistics + (workers + j) * channels + c, square / (m - 1), mask=ok)
    scale, shift = _affine(tl.rsqrt(square / m + eps), gamma, beta, c, ok, affine)
    rows = tl.cdiv(m, split)
    first = part * rows
    last = tl.minimum(first + rows, m)
    for behind in range(0, last - first, high):
        r = first + (tl.cdiv(last - first, high) - 1) * high - behind + tl.arange(0, high)
        at = _places(r, c, j, pixels, channels, workers)
        mask = (r < last)[:, None] & ok[None, :]
        v = tl.load(x + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        v = (v - mean[None, :]) * scale[None, :] + shift[None, :]
        if adds:
            v += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        if relu:
            v = tl.where(v <= 0.0, 0.0, v)  # NaN stays
        tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _gradient_sums(
    grad, x, y, masked, sums, gamma, beta, statistics, m, pixels, channels, workers, eps,
    split: tl.constexpr, relu: tl.constexpr, adds: tl.constexpr, affine: tl.constexpr,
    high: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Σd and Σ(d x̂) of a part of a worker's rows; where a residual was added also d itself, which is its gradient."""
    c = tl.program_id(0) * wide + tl.arange(0, wide)
    part, j = tl.program_id(1), tl.program_id(2)
    ok = c < channels
    mean = tl.load(statistics + j * channels + c, mask=ok, other=0.0)
    inverse = tl.rsqrt(tl.load(statistics + (workers + j) * channels + c, mask=ok, other=1.0) * (m - 1) / m + eps)
    scale, shift = _affine(inverse, gamma, beta, c, ok, affine)
    rows = tl.cdiv(m, split)
    first = part * rows
    last = tl.minimum(first + rows, m)
    plain = tl.zeros((high, wide), tl.float32)
    along = tl.zeros((high, wide), tl.float32)
    for start in range(first, last, high):
        r = start + tl.arange(0, high)
        at = _places(r, c, j, pixels, channels, workers)
        mask = (r < last)[:, None] & ok[None, :]
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        if relu:
            if adds:
                out = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
            else:
                out = (v - mean[None, :]) * scale[None, :] + shift[None, :]
            d = tl.where(out <= 0.0, 0.0, d)
            if adds:
                tl.store(masked + at, d.to(masked.dtype.element_ty), mask=mask)
        plain += d
        along += d * tl.where(mask, v - mean[None, :], 0.0)
    place = sums + ((part * workers + j) * 2) * channels + c
    tl.store(place, tl.sum(plain, 0), mask=ok)
    tl.store(place + channels, tl.sum(along, 0) * inverse, mask=ok)


@triton.jit
def _gradient(
    d, x, dx, sums, gamma, beta, statistics, weights, m, pixels, channels, workers, eps,
    split: tl.constexpr, relu: tl.constexpr, affine: tl.constexpr, high: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """∂L/∂x; the programs of the first part of worker 0 add ∂L/∂γ and ∂L/∂β over all workers."""
    c = tl.program_id(0) * wide + tl.arange(0, wide)
    part, j = tl.program_id(1), tl.program_id(2)
    ok = c < channels
    parts = tl.arange(0, split)
    if affine & (part == 0) & (j == 0):
        of_beta = tl.zeros((split, wide), tl.float32)
        of_gamma = tl.zeros((split, wide), tl.float32)
        for start in range(0, split * workers, split):
            place = sums + ((start + parts)[:, None] * 2) * channels + c[None, :]
            of_beta += tl.load(place, mask=ok[None, :], other=0.0)
            of_gamma += tl.load(place + channels, mask=ok[None, :], other=0.0)
        tl.store(weights + c, tl.sum(of_gamma, 0), mask=ok)
        tl.store(weights + channels + c, tl.sum(of_beta, 0), mask=ok)
    place = sums + ((parts[:, None] * workers + j) * 2) * channels + c[None, :]
    plain = tl.sum(tl.load(place, mask=ok[None, :], other=0.0), 0) / m
    along = tl.sum(tl.load(place + channels, mask=ok[None, :], other=0.0), 0) / m
    mean = tl.load(statistics + j * channels + c, mask=ok, other=0.0)
    inverse = tl.rsqrt(tl.load(statistics + (workers + j) * channels + c, mask=ok, other=1.0) * (m - 1) / m + eps)
    scale, shift = _affine(inverse, gamma, beta, c, ok, affine)
    slope = along * inverse
    rows = tl.cdiv(m, split)
    first = part * rows
    last = tl.minimum(first + rows, m)
    for behind in range(0, last - first, high):
        r = first + (tl.cdiv(last - first, high) - 1) * high - behind + tl.arange(0, high)
        at = _places(r, c, j, pixels, channels, workers)
        mask = (r < last)[:, None] & ok[None, :]
        v = tl.load(x + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(d + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        v -= mean[None, :]
        if relu:
            g = tl.where(v * scale[None, :] + shift[None, :] <= 0.0, 0.0, g)
        out = scale[None, :] * (g - plain[None, :] - v * slope[None, :])
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)


def _launch(rows: int, channels: int, workers: int, *, backward: bool) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Programs over (blocks of channels, parts of a worker's rows, workers), and their tile.

    The tiles are those that were fastest on an H200, where a narrow network's gradients want few registers.
    """
    high, wide, programs = 64, 64, 1056  # eight for each of 132 multiprocessors
    if backward and channels < 128:
        high, programs = 32, 2112
    elif not backward and channels % 128 == 0:
        high, wide = 32, 128
    blocks = triton.cdiv(channels, wide)
    wanted = triton.cdiv(programs, blocks * workers)
    split = min(SPLIT * 64 // wide, triton.next_power_of_2(min(wanted, triton.cdiv(rows, high))))
    return (blocks, split, workers), {"split": split, "high": high, "wide": wide, "num_warps": WARPS}


def _started(kernel: Any, grid: tuple[int, int, int]) -> Callable[..., None]:
    return kernel[grid]


def ghost_forward(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, residual: Tensor | None, n: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """Normalise g workers' samples, whose rows alternate, each by itself.

    Args:
        x: (g·n, C, H, W), channels_last; float32, float16 or bfloat16.
        gamma, beta: (C,) each, or None both.
        residual: None or as x.
        n: samples a worker.

    Returns:
        y like x, and the workers' means and unbiased variances as float32, (2, g, C).
    """
    samples, channels, height, width = x.shape
    workers, pixels = samples // n, height * width
    rows = n * pixels
    grid, tile = _launch(rows, channels, workers, backward=False)
    y = torch.empty_like(x)
    partial = torch.empty(grid[1] * workers * 2 * channels, dtype=torch.float32, device=x.device)
    statistics = torch.empty(2, workers, channels, dtype=torch.float32, device=x.device)
    shape: Any = (rows, pixels, channels, workers)
    _started(_moments, grid)(x, partial, *shape, **tile)
    kind = {"relu": relu, "adds": residual is not None, "affine": gamma is not None}
    _started(_normalise, grid)(x, residual, y, partial, gamma, beta, statistics, *shape, eps, **kind, **tile)
    return y, statistics


def ghost_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    statistics: Tensor,
    n: int,
    eps: float,
    relu: bool,
    adds: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `ghost_forward`.

    Args:
        grad: ∂L/∂y, channels_last.
        y: what it returned, where a residual was added before a ReLU; else None.

    Returns:
        ∂L/∂x, ∂L/∂residual (what belongs to no one where there was none), and ∂L/∂(γ, β) as float32, (2, C).
    """
    samples, channels, height, width = x.shape
    workers, pixels = samples // n, height * width
    rows = n * pixels
    grid, tile = _launch(rows, channels, workers, backward=True)
    dx = torch.empty_like(x)
    masked = torch.empty_like(x) if relu and adds else grad
    sums = torch.empty(grid[1] * workers * 2 * channels, dtype=torch.float32, device=x.device)
    weights = torch.empty(2, channels, dtype=torch.float32, device=x.device)
    shape: Any = (rows, pixels, channels, workers)
    affine = gamma is not None
    _started(_gradient_sums, grid)(
        grad, x, y, masked, sums, gamma, beta, statistics, *shape, eps, relu=relu, adds=adds, affine=affine, **tile
    )
    again = relu and not adds
    _started(_gradient, grid)(
        masked, x, dx, sums, gamma, beta, statistics, weights, *shape, eps, relu=again, affine=affine, **tile
    )
    return dx, masked, weights


class Ghost(torch.autograd.Function):
    """`ghost_forward` with its gradients."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        x, gamma, beta, residual, n, eps, relu = given
        y, statistics = ghost_forward(x, gamma, beta, residual, n, eps, relu)
        adds = residual is not None
        ctx.save_for_backward(x, y if relu and adds else None, gamma, beta, statistics)
        ctx.options = n, eps, relu, adds
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, y, gamma, beta, statistics = ctx.saved_tensors
        n, eps, relu, adds = ctx.options
        grad = grad_outputs[0].to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, masked, weights = ghost_backward(grad, x, y, gamma, beta, statistics, n, eps, relu, adds)
        wanted = ctx.needs_input_grad
        of_gamma, of_beta = (
            part.to(owner.dtype) if asked else None
            for part, owner, asked in zip(weights, (gamma, beta), wanted[1:3], strict=True)
        )
        return dx, of_gamma, of_beta, masked if adds else None, None, None, None

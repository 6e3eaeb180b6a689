"""Max pooling over 3×3 with stride 2 in NHWC memory on a GPU: one byte an output says which of nine inputs it was.

torch keeps eight bytes for that, four times what it pools in bfloat16, and fills the gradient with zeros first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

HIGH, WIDE = 32, 64


@triton.jit
def _pool(x, y, which, rows, height, width, high_out, wide_out, channels, high: tl.constexpr, wide: tl.constexpr):
    """The first of the largest of nine, in the order of torch; NaN is larger than all."""
    r = tl.program_id(0) * high + tl.arange(0, high)
    c = tl.program_id(1) * wide + tl.arange(0, wide)
    ok = (r < rows)[:, None] & (c < channels)[None, :]
    top, left = r // wide_out % high_out * 2 - 1, r % wide_out * 2 - 1
    image = r // (wide_out * high_out)
    best = tl.full((high, wide), float("-inf"), tl.float32)
    tap = tl.zeros((high, wide), tl.int32)
    for i in tl.static_range(9):  # pyright: ignore[reportGeneralTypeIssues]
        down, across = top + i // 3, left + i % 3
        inside = ok & ((down >= 0) & (down < height) & (across >= 0) & (across < width))[:, None]
        at = ((image * height + down) * width + across).to(tl.int64)[:, None] * channels + c[None, :]
        v = tl.load(x + at, mask=inside, other=float("-inf")).to(tl.float32)
        better = inside & ((v > best) | (v != v))
        best = tl.where(better, v, best)
        tap = tl.where(better, i, tap)
    at = r.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(y + at, best.to(y.dtype.element_ty), mask=ok)
    tl.store(which + at, tap.to(tl.uint8), mask=ok)


@triton.jit
def _unpool(grad, which, dx, rows, height, width, high_out, wide_out, channels, high: tl.constexpr, wide: tl.constexpr):
    """An input takes the gradient of every window, four at most, whose largest it was."""
    r = tl.program_id(0) * high + tl.arange(0, high)
    c = tl.program_id(1) * wide + tl.arange(0, wide)
    ok = (r < rows)[:, None] & (c < channels)[None, :]
    down, across = r // width % height, r % width
    image = r // (width * height)
    total = tl.zeros((high, wide), tl.float32)
    for i in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
        window_down, window_across = (down + 1) // 2 - i // 2, (across + 1) // 2 - i % 2
        tap_down, tap_across = down + 1 - 2 * window_down, across + 1 - 2 * window_across
        covers = (tap_down <= 2) & (tap_across <= 2) & (window_down >= 0) & (window_across >= 0)
        inside = ok & (covers & (window_down < high_out) & (window_across < wide_out))[:, None]
        at = ((image * high_out + window_down) * wide_out + window_across).to(tl.int64)[:, None] * channels + c[None, :]
        tap = tl.load(which + at, mask=inside, other=255).to(tl.int32)
        mine = inside & (tap == (tap_down * 3 + tap_across)[:, None])
        total += tl.load(grad + at, mask=mine, other=0.0).to(tl.float32)
    at = r.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=ok)


class MaxPool(torch.autograd.Function):
    """`F.max_pool2d(x, 3, stride=2, padding=1)` for (N, C, H, W) in channels_last, with its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        size = (samples, channels, (height + 1) // 2, (width + 1) // 2)
        y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        which = torch.empty_like(y, dtype=torch.uint8)
        _run(_pool, x, y, which, rows=y.numel() // channels, sides=(*x.shape[2:], *size[2:]), channels=channels)
        ctx.save_for_backward(which)
        ctx.size = x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (which,) = ctx.saved_tensors
        grad = grad_outputs[0].contiguous(memory_format=torch.channels_last)
        samples, channels, height, width = ctx.size
        dx = torch.empty(ctx.size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        sides = (height, width, *which.shape[2:])
        _run(_unpool, grad, which, dx, rows=samples * height * width, sides=sides, channels=channels)
        return dx


def _run(kernel: Any, *tensors: Tensor, rows: int, sides: tuple[int, ...], channels: int) -> None:
    grid = (triton.cdiv(rows, HIGH), triton.cdiv(channels, WIDE))  # CUDA allows 65535 in all dimensions but the first
    kernel[grid](*tensors, rows, *sides, channels, high=HIGH, wide=WIDE)

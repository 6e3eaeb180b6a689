"""Pooling in NHWC memory, by Triton's interpreter, against torch's."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from onehour.models import max_pool
from onehour.models.max_pool import MaxPool


@pytest.mark.parametrize("size", [(2, 5, 7, 7), (1, 70, 4, 6), (3, 3, 1, 2), (2, 4, 8, 5)], ids=str)
def test_outputs_and_gradients_are_torchs(size: tuple[int, ...]):
    draw = torch.Generator().manual_seed(0)
    results = []
    images = torch.randn(size, generator=draw).contiguous(memory_format=torch.channels_last)
    for pool in (MaxPool.apply, lambda x: F.max_pool2d(x, 3, stride=2, padding=1)):
        x = images.clone(memory_format=torch.preserve_format).requires_grad_()
        y = pool(x)
        y.backward(torch.arange(y.numel(), dtype=torch.float32).view(y.shape))
        assert x.grad is not None
        results.append((y, x.grad))
    (mine, gradient), (torchs, expected) = results
    assert mine.equal(torchs)
    assert gradient.equal(expected)


def test_of_equals_the_first_is_taken_and_nan_is_larger_than_all():
    x = torch.zeros(1, 1, 4, 4).contiguous(memory_format=torch.channels_last)
    x[0, 0, 2, 2] = torch.nan
    x.requires_grad_()
    y = MaxPool.apply(x)
    torchs = F.max_pool2d(x, 3, stride=2, padding=1)
    torch.testing.assert_close(y, torchs, equal_nan=True)
    gradients = [torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (y, torchs)]
    assert gradients[0].equal(gradients[1])


def test_many_images_make_a_grid_that_cuda_takes(monkeypatch: pytest.MonkeyPatch):
    """65535 programs in all dimensions but the first."""
    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *given, **options: None

    for name in ("_pool", "_unpool"):
        monkeypatch.setattr(max_pool, name, Kernel())
    images = torch.empty(1024, 64, 112, 112, device="meta", requires_grad=True)
    MaxPool.apply(images).sum().backward()
    assert [grid[0] for grid in grids] == [1024 * 56 * 56 // 32, 1024 * 112 * 112 // 32]
    assert max(size for grid in grids for size in grid[1:]) <= 65535

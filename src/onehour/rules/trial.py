"""Whether a layer is for several workers together what another is for each alone: it is tried (paper §2.3)."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SAMPLES, WORKERS = 3, 2
"""n and g of a trial."""

TOLERANCE = 1e-4
"""Of float32 sums over few numbers; what is over other samples differs in the first digits."""


def varied(layer: _BatchNorm) -> _BatchNorm:
    """A copy in training, in float32 on the CPU, with numbers as they are later: at first γ = 1 and β = 0 hide much.

    What lies in it is as in evaluation: dropout would draw other numbers for workers together than for each alone.
    """
    found = copy.deepcopy(layer).to_empty(device="cpu").float().train()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in chain(found.parameters(), found.buffers()):
            tensor.uniform_(0.5, 1.5, generator=draw) if tensor.is_floating_point() else tensor.zero_()
    for child in found.children():
        child.eval()
    for module in found.modules():  # whoever hangs hooks on them expects no trial's batch
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return found


def batch_for(layer: _BatchNorm) -> Tensor:
    """A batch of g workers, worker j's samples in the rows j, j + g …, whose means differ."""
    size = {nn.BatchNorm1d: (), nn.BatchNorm3d: (2, 2, 2)}
    pixels = next((size[kind] for kind in size if isinstance(layer, kind)), (2, 2))
    draw = torch.Generator().manual_seed(1)
    own = {"dtype": torch.float32, "device": "cpu"}  # whatever the user's defaults are
    x = torch.randn(SAMPLES * WORKERS, layer.num_features, *pixels, generator=draw, **own)
    return x + (torch.arange(len(x), **own) % WORKERS).view(-1, *[1] * (x.ndim - 1))


def why_not_alone(own: _BatchNorm, together: _BatchNorm, x: Tensor) -> str:
    """Why `together`, over all of x, is not what `own` is over each worker's rows; empty if it is.

    The outputs must be the same, running statistics the mean of those that `own` has after each worker, and all workers
    one batch.
    """
    alone = [copy.deepcopy(own) for _ in range(WORKERS)]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = [layer.forward(x[worker::WORKERS].clone()) for worker, layer in enumerate(alone)]
            found = together.forward(x.clone())
    except Exception as error:
        said = str(error).splitlines()
        return f"in a trial its forward raises {type(error).__name__}: {said[0] if said else ''}"
    if not torch.is_tensor(found) or found.shape[:1] != x.shape[:1]:
        return "its forward returns no tensor of as many samples"
    if not all(_close(found[worker::WORKERS], rows) for worker, rows in enumerate(expected)):
        return "what it computes for a sample depends on more than the n samples with it"
    for name, buffer in together.named_buffers():
        mean = torch.stack([layer.get_buffer(name) for layer in alone]).float().mean(0)
        counted = name == "num_batches_tracked" and int(buffer) <= 1  # whether or not it counts by itself
        if not counted and not _close(buffer.float(), mean):
            return f"its {name} moves in a way of its own"
    return ""


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)

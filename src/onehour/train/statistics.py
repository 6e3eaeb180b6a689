"""BatchNorm's running statistics of a whole model, moved once an iteration by all k workers (paper §2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onehour.rules.batchnorm import ghost_layers

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """The running means and variances of every ghost layer as one vector, of which the buffers become views.

    Args:
        model: converted by `convert_batchnorm` and on its device.

    Raises:
        ValueError: for a layer with momentum None: a cumulative average has no meaning for a schedule.

    >>> from onehour import GhostBatchNorm2d
    >>> RunningStatistics(GhostBatchNorm2d(3, per_worker=4)).floats
    7
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = ghost_layers(model)
        widths = [layer.num_features for layer in self.layers]
        self.channels = sum(widths)
        self.floats = 2 * self.channels + len(widths)
        if not self.layers:
            return
        if any(layer.momentum is None for layer in self.layers):
            raise ValueError("a BatchNorm has momentum None (a cumulative average); give it a number such as 0.1")
        device = self.layers[0].running_mean.device  # pyright: ignore[reportOptionalMemberAccess]
        per_channel = [m for layer in self.layers for m in [layer.momentum] * layer.num_features]
        self._share = torch.tensor(per_channel * 2, device=device)
        self._layer_of = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths)).repeat(2).to(device)
        means, variances = ([getattr(layer, name) for layer in self.layers] for name in ("running_mean", "running_var"))
        self._running = torch.cat([*means, *variances])
        self._counts = torch.stack([_tracked(layer) for layer in self.layers])
        self._share = self._share.to(self._running.dtype)
        start = 0
        for number, layer in enumerate(self.layers):
            stop = start + layer.num_features
            layer.running_mean = self._running[start:stop]
            layer.running_var = self._running[self.channels + start : self.channels + stop]
            layer.num_batches_tracked = self._counts[number]
            start = stop

    def collect_into(self, sums: Tensor | None) -> None:
        """Let the layers add their workers' statistics to views of `sums` (`floats` values); None stops it.

        >>> from onehour import GhostBatchNorm2d
        >>> layer = GhostBatchNorm2d(3, per_worker=4)
        >>> RunningStatistics(layer).collect_into(torch.zeros(7)); len(layer.sums)
        3
        """
        start = 0
        for number, layer in enumerate(self.layers):
            stop = start + layer.num_features
            layer.sums = (
                None
                if sums is None
                else (
                    sums[start:stop],
                    sums[self.channels + start : self.channels + stop],
                    sums[2 * self.channels + number :][:1],
                )
            )
            start = stop

    @torch.no_grad()
    def commit(self, sums: Tensor, live: Tensor) -> None:
        """Move every layer once by sums / workers seen; not where no worker saw it, nor where `live` is false.

        Args:
            sums: what the layers collected, over all processes.
            live: a boolean scalar tensor, so that the host need not know it.

        >>> RunningStatistics(nn.ReLU()).commit(torch.zeros(0), torch.tensor(True))
        """
        if not self.layers:
            return
        counts = sums[2 * self.channels :]
        seen = (counts > 0) & live
        mean = sums[: 2 * self.channels] / counts.index_select(0, self._layer_of)
        mean = torch.where(seen.index_select(0, self._layer_of), mean, self._running)
        self._running.lerp_(mean, self._share)
        self._counts += seen


def _tracked(layer: nn.Module) -> Tensor:
    tracked = layer.num_batches_tracked
    assert isinstance(tracked, Tensor)
    return tracked

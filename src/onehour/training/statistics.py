"""BatchNorm's running statistics of a whole model, moved once an iteration by all k workers (paper §2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onehour.rules.batchnorm import ghost_layers
from onehour.training.pitfalls import Decisions

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
        self.dtype = torch.get_default_dtype()
        if not self.layers:
            return
        if any(layer.momentum is None for layer in self.layers):
            raise ValueError("a BatchNorm has momentum None (a cumulative average); give it a number such as 0.1")
        device = self.layers[0].running_mean.device  # pyright: ignore[reportOptionalMemberAccess]
        # Layer by layer (means, variances), as the layers add to what travels; the workers' counts behind them.
        momentum = [layer.momentum for layer in self.layers]
        twice = torch.tensor([2 * width for width in widths])
        self._layer_of = torch.repeat_interleave(torch.arange(len(widths)), twice).to(device)
        both = [(layer.running_mean, layer.running_var) for layer in self.layers]
        self._running = torch.cat([statistic for pair in both for statistic in pair])  # pyright: ignore
        self.dtype = self._running.dtype
        self._share = torch.tensor(momentum, dtype=self._running.dtype, device=device)[self._layer_of]
        self._counts = torch.stack([_tracked(layer) for layer in self.layers])
        for number, (layer, part) in enumerate(zip(self.layers, self._parts(self._running), strict=True)):
            layer.running_mean, layer.running_var = part
            layer.num_batches_tracked = self._counts[number]

    def _parts(self, flat: Tensor) -> list[Tensor]:
        """Each layer's (2, C) view of a vector."""
        cut = flat[: 2 * self.channels].split([2 * layer.num_features for layer in self.layers])
        return [part.view(2, -1) for part in cut]

    def collect_into(self, sums: Tensor | None) -> None:
        """Let the layers add their workers' statistics to views of `sums` (`floats` values); None stops it.

        >>> from onehour import GhostBatchNorm2d
        >>> layer = GhostBatchNorm2d(3, per_worker=4)
        >>> RunningStatistics(layer).collect_into(torch.zeros(7))
        >>> [view.shape for view in layer.sums]
        [torch.Size([2, 3]), torch.Size([1])]
        """
        if sums is None or not self.layers:
            for layer in self.layers:
                layer.sums = None
            return
        counts = sums[2 * self.channels :].split(1)
        for layer, total, count in zip(self.layers, self._parts(sums), counts, strict=True):
            layer.sums = (total, count)

    def weigh(self, shares: Tensor | None) -> None:
        """Let the next pass's workers count by `shares`, of shape (layers, g), in place of all alike.

        >>> RunningStatistics(nn.ReLU()).weigh(None)
        """
        for number, layer in enumerate(self.layers):
            layer.shares = None if shares is None else shares[number]

    def apply(self, decisions: Decisions) -> Tensor | None:
        """Take over what a recipe's decisions say of the statistics.

        Returns:
            The workers' shares, (layers, k), of which each pass must be given its own by `weigh`; None for all alike.

        >>> from onehour import Recipe
        >>> RunningStatistics(nn.ReLU()).apply(Decisions(Recipe(samples=1024))) is None
        True
        """
        shares = [decisions.shares(layer.momentum or 0.0) for layer in self.layers]
        given = [share for share in shares if share is not None]
        if not given:
            return None
        self._share = self._share.cpu().clone().apply_(decisions.moved).to(self._running.device)
        return torch.stack(given).to(self._running)

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

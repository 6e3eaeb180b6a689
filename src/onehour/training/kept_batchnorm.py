"""A network's own BatchNorm, kept as it is: how a run moves its statistics once an iteration (§2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from onehour.training.engine import RunningStatistics, StatisticsRule

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def tracked_layers(model: nn.Module) -> list[_BatchNorm]:
    """The model's BatchNorm layers that keep running statistics, converted or not."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def refuse_synchronised(model: nn.Module) -> None:
    """Refuse a BatchNorm whose statistics are not those of a pass."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, whose statistics are those of all processes, and"
                f" batchnorm keep takes those of a pass; use torch.nn.BatchNorm1d, 2d or 3d there"
            )


class KeptStatistics(RunningStatistics):
    """The running statistics of layers that move them by themselves, whatever their rule.

    A pass is one worker, and each begins with what the iteration began with; after the iteration they are the mean over
    all k workers of what a pass has left. With torch's own rule r ← (1 − m)·r + m·s that is (1 − m)·r + m·Σs/k, as for
    ghost layers.
    """

    find = staticmethod(tracked_layers)

    def __init__(self, model: nn.Module, rule: StatisticsRule) -> None:
        super().__init__(model, rule)
        if self.layers:
            self._begun = self._running.clone(), self._counts.clone()
            self._move.fill_(1)
        self._views: list[tuple[nn.Module, str, Tensor]] = []
        self._between = True
        """Whether the layers hold what an iteration begins with."""

    def _collect_from(self, number: int, *, in_place: bool) -> None:
        layer = self.layers[number]
        self._views += [(layer, name, getattr(layer, name)) for name in BUFFERS]

    def detach(self) -> None:
        """Nothing was left with the layers."""

    def begin_pass(self, workers: range) -> None:
        assert len(workers) == 1
        if not self.layers:
            return
        for begun, now in zip(self._begun, (self._running, self._counts), strict=True):
            if self._between:
                begun.copy_(now)
            else:
                now.copy_(begun)
        self._between = False

    @torch.no_grad()
    def end_pass(self) -> None:
        """Add what the worker's pass has left, where it has used a layer."""
        if not self.layers:
            return
        for layer, name, view in self._views:
            left = getattr(layer, name)
            if left is not view:  # it assigns a tensor of its own
                view.copy_(left)
                setattr(layer, name, view)
        used = self._counts != self._begun[1]
        self._sums += torch.where(used.index_select(0, self._layer_of), self._running, 0.0)
        self._workers += used

    def commit(self, live: Tensor) -> None:
        if not self.layers:
            return
        self._running.copy_(self._begun[0])
        self._counts.copy_(self._begun[1])
        self._between = True
        super().commit(live)

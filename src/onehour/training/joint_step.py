"""One iteration of several seeds as one network; each seed has its own samples, loss and end (paper eq 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from onehour.rules.aggregate import global_mean
from onehour.rules.batchnorm import repeat_parameters
from onehour.rules.momentum import set_rate
from onehour.training.pitfalls import Decisions
from onehour.training.precision import forward
from onehour.training.statistics import RunningStatistics
from onehour.training.timing import StepTimer

__all__ = ["JointStep"]


class JointStep:
    """Takes S seeds through an iteration: gradients do not mix, since no channel of one reads another's.

    A seed whose loss is not finite is no longer `alive`; the others go on.

    Args:
        decisions: of each seed; alike but for their samples.
        model: joined, on the device.
        images, labels: the training data, on the device.
        passes: the workers of each pass.
    """

    def __init__(
        self,
        decisions: Sequence[Decisions],
        model: nn.Module,
        optimizer: Optimizer,
        *,
        images: Tensor,
        labels: Tensor,
        passes: list[range],
        timer: StepTimer,
    ) -> None:
        self.recipe, self.decisions = decisions[0].recipe, decisions[0]
        self.model, self.optimizer, self.passes, self.timer = model, optimizer, passes, timer
        self.images, self.labels = images, labels.long()
        self.streams = [decision.stream() for decision in decisions]
        seeds, device = len(decisions), images.device
        self.statistics = RunningStatistics(model)
        self.sums = torch.zeros(self.statistics.floats, device=device, dtype=self.statistics.dtype)
        self.statistics.collect_into(self.sums)
        self.shares = self.statistics.apply(self.decisions)
        self.inside = self.decisions.corrected(optimizer)
        self.alive = torch.ones(seeds, dtype=torch.bool, device=device)
        self.totals = torch.zeros(seeds, 2, dtype=torch.float64, device=device)
        """Σ of the iterations' mean losses and of their errors for each seed, since the caller set them to zero."""

    def __call__(self, iteration: int) -> None:
        """Iteration t."""
        recipe, timer = self.recipe, self.timer
        set_rate(self.optimizer, self.decisions.rate(iteration), self.inside)
        timer.begin()
        self.sums.zero_()
        self.optimizer.zero_grad(set_to_none=True)
        scalars = torch.zeros_like(self.totals)
        for workers in self.passes:
            images, labels = self._batch(iteration, workers)
            timer.lap("data")
            repeat_parameters(self.statistics.layers, len(workers))
            if self.shares is not None:
                self.statistics.weigh(self.shares[:, workers.start : workers.stop])
            logits = forward(self.model, images, recipe).view(labels.numel(), -1)
            losses = F.cross_entropy(logits, labels.flatten(), reduction="none").view(labels.shape)
            repeat_parameters(self.statistics.layers, 1)
            global_mean(losses.sum(), self.decisions.divisor).backward()
            with torch.no_grad():
                wrong = (logits.argmax(1) != labels.flatten()).view(labels.shape)
                scalars += torch.stack((losses.sum(0) / recipe.minibatch, wrong.sum(0)), 1)
            timer.lap("compute")
        self.alive &= scalars[:, 0].isfinite()
        self.totals += torch.where(self.alive[:, None], scalars, 0.0)
        self.optimizer.step()
        self.statistics.commit(self.sums, torch.ones((), dtype=torch.bool, device=self.sums.device))
        timer.lap("update")
        timer.end()

    @torch.no_grad()
    def look(self) -> None:
        """Find seeds whose weights or statistics are not finite, though their losses still are."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.ndim:
                self.alive &= tensor.reshape(len(self.streams), -1).isfinite().all(1)

    @torch.no_grad()
    def clear(self, seed: int) -> None:
        """Set everything of a seed that has left the finite numbers to zero, so that the others cannot meet it."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.ndim:
                tensor.chunk(len(self.streams))[seed].zero_()
        for state in self.optimizer.state.values():
            for value in state.values():
                if torch.is_tensor(value) and value.ndim:
                    value.chunk(len(self.streams))[seed].zero_()

    def _batch(self, iteration: int, workers: range) -> tuple[Tensor, Tensor]:
        """Images (g·n, S·C, …) and labels (g·n, S)."""
        chosen = torch.stack([torch.from_numpy(stream.indices(iteration, workers)) for stream in self.streams], 1)
        chosen = chosen.to(self.images.device)
        images = self.images.index_select(0, chosen.flatten())
        return images.view(*chosen.shape, *images.shape[1:]).flatten(1, 2), self.labels[chosen]

"""An average of the weights beside them, moved at every update that counts (Busbridge et al. 2023)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PREFIX = "ema/"
"""Of their names in a checkpoint, where what an optimizer keeps is called after its parameter."""


class AveragedWeights:
    """ā ← ρ·ā + (1 − ρ)·w after each update, from the initial weights on, for every parameter that trains.

    Buffers are the model's own: BatchNorm's running statistics are averages already, and averaged again would be those
    of older weights than ā is made of.

    Args:
        decay: ρ' of the run's minibatch.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        named = model.named_parameters(remove_duplicate=False)
        self._named = {name: parameter for name, parameter in named if parameter.requires_grad}
        self._weights: list[Tensor] = list(dict.fromkeys(self._named.values()))
        self._averages = [weight.detach().clone() for weight in self._weights]
        self._share = self._averages[0].new_tensor(1 - decay)

    def set_decay(self, decay: float) -> None:
        """Go on with ρ' of another minibatch."""
        self._share.fill_(1 - decay)

    @torch.no_grad()
    def move(self, live: Tensor) -> None:
        """Take the weights in; not where `live`, a boolean scalar tensor, is false: the host need not know it."""
        moves = torch._foreach_sub(self._weights, self._averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(moves, self._share * live)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(self._averages, moves)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def in_place(self) -> Generator[None]:
        """While entered, the model's weights are the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        """By value: a CUDA graph knows both by their places in memory."""
        for weight, average in zip(self._weights, self._averages, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        """The averages where they lie, by names for a checkpoint."""
        lies = dict(zip(self._weights, self._averages, strict=True))
        return {f"{PREFIX}{name}": lies[weight] for name, weight in self._named.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take what `state` gave out of a checkpoint's tensors."""
        for name, average in self.state().items():
            average.copy_(state.pop(name))


def averages_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averages among a checkpoint's tensors, by their parameters' names."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}

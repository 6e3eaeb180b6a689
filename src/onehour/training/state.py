"""What a run consists of between two iterations: its network, and weights, statistics and velocity as tensors by name.

An optimizer's numbers are tensors too, of their exact type and value; their names end in "#".
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NUMBER = "#"
OF_THE_RECIPE = {"params", "lr", "lr_scale", "initial_lr", "weight_decay"}
"""What a run gives an optimizer's groups by itself."""
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
        untyped: Any = torch
        moves = untyped._foreach_sub(self._weights, self._averages)
        untyped._foreach_mul_(moves, self._share * live)
        untyped._foreach_add_(self._averages, moves)

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


class Network:
    """A model, its optimizer, and the average of its weights if there is one: a run's own, or S runs' as one."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, average: AveragedWeights | None = None) -> None:
        self.model, self.optimizer, self.average = model, optimizer, average

    @property
    def parts(self) -> Sequence[Network]:
        """What each of its runs has of it: one run has all."""
        return [self]

    def give_back(self) -> None:
        """Let each run's part hold what was trained; it does."""

    def alive(self, known: Tensor) -> Tensor:
        """Which seeds have finite numbers alone, bool (S,).

        Args:
            known: what the last iteration has found.
        """
        return known

    def clear(self, seed: int) -> None:
        """Take a seed that has left the finite numbers out of the network; alone, it ends the run."""


def model_state(model: nn.Module, *, copy: bool = True) -> dict[str, Tensor]:
    """Weights and buffers by torch's names, copied to CPU memory, or without `copy` where they lie."""
    state: dict[str, Tensor] = dict(model.state_dict())
    return host_copies(state) if copy else state


def optimizer_state(optimizer: Optimizer, model: nn.Module, *, copy: bool = True) -> dict[str, Tensor]:
    """Velocity and whatever else the optimizer keeps, by parameter/key; `copy` as for `model_state`.

    Of its groups, the numbers that are not its defaults, such as a count of steps; not what the recipe says.
    """
    state, parameters = dict[str, Tensor](), dict(model.named_parameters())
    keeps = f"optimizer {type(optimizer).__name__} keeps"
    if optimizer.state.keys() - set(parameters.values()):
        raise ValueError(
            f"{keeps} state that belongs to no parameter, and a checkpoint holds only that of"
            " parameters and groups; choose another optimizer"
        )
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and not value.is_complex() and value.layout is torch.strided:
                state[f"{name}/{key}"] = value.detach()
            elif isinstance(value, float | int):
                state[f"{name}/{key}{NUMBER}"] = _exact(value)
            elif value is not None:
                kind = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{keeps} a {kind} as {key!r}, and a checkpoint holds plain tensors of real numbers and numbers"
                    " alone; choose another optimizer"
                )
    for name, group in _groups(optimizer).items():
        for key in group.keys() - OF_THE_RECIPE:
            if isinstance(group[key], float | int) and group[key] != optimizer.defaults.get(key):
                state[f"{name}/{key}{NUMBER}"] = _exact(group[key])
    return host_copies(state) if copy else state


def load_optimizer(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_state` took.

    Raises:
        KeyError: for a state of another model's.
    """
    parameters, groups = dict(model.named_parameters()), _groups(optimizer)
    for full, value in state.items():
        name, _, key = full.rpartition("/")
        if key.endswith(NUMBER):
            key = key.removesuffix(NUMBER)
            if name in groups and key in OF_THE_RECIPE:
                raise KeyError(full)
            kept = groups[name] if name in groups else optimizer.state[parameters[name]]
            kept[key] = value.item()
            continue
        parameter = parameters[name]
        if key != "step" or getattr(optimizer, "_step_supports_amp_scaling", False):  # else it is counted on the host
            value = value.to(parameter.device)
            if value.shape == parameter.shape:  # a fused optimizer pairs the two by their places in memory
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        known = optimizer.state[parameter].get(key)
        if isinstance(known, Tensor):
            known.copy_(value)
        else:
            optimizer.state[parameter][key] = value


def host_copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in CPU memory, pinned where they come from a GPU, whose copies then go on beside each other."""
    copies = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)
        for name, tensor in state.items()
    }
    for device in {tensor.device for tensor in state.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def digest_of(*states: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for state in states:
        for name in sorted(state):
            tensor = state[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _groups(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    return {f"group {number}": group for number, group in enumerate(optimizer.param_groups)}


def _exact(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)

"""What a run consists of between two iterations, as tensors by name: weights, statistics, velocity.

An optimizer's numbers are tensors too, of their exact type and value; their names end in "#".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NUMBER = "#"
OF_THE_RECIPE = {"params", "lr", "lr_scale", "initial_lr", "weight_decay"}
"""What a run gives an optimizer's groups by itself."""


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

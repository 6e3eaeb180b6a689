"""What a run consists of between two iterations, as tensors by name: weights, statistics, velocity.

An optimizer's numbers are tensors too, of their exact type and value; their names end in "#".
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["digest_of", "load_optimizer", "model_state", "optimizer_state"]

NUMBER = "#"
OF_THE_RECIPE = {"params", "lr", "initial_lr", "weight_decay"}
"""What a run gives an optimizer's groups by itself."""


def model_state(model: nn.Module, *, copy: bool = True) -> dict[str, Tensor]:
    """Weights and buffers by torch's names, in CPU memory.

    Args:
        copy: False shares the weights' own memory where it can: for who is done, or has let go, before the next update.
            Buffers are always copied, since a forward pass may change them.

    >>> list(model_state(nn.Linear(2, 1)))
    ['weight', 'bias']
    """
    state, seen = {}, set()
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, tensor in model.state_dict().items():
        # Tied weights: safetensors wants each name to have memory of its own.
        state[name] = _on_host(tensor, copy=copy or name in buffers or tensor.data_ptr() in seen)
        seen.add(tensor.data_ptr())
    return state


def optimizer_state(optimizer: Optimizer, model: nn.Module, *, copy: bool = True) -> dict[str, Tensor]:
    """Velocity and whatever else the optimizer keeps, by parameter/key; `copy` as for `model_state`.

    Of its groups, the numbers that are not its defaults, such as a count of steps; not what the recipe says.

    Raises:
        ValueError: for an optimizer that keeps something else than tensors and numbers.

    >>> model = nn.Linear(2, 1)
    >>> optimizer_state(torch.optim.SGD(model.parameters(), lr=0.1), model)
    {}
    """
    state, parameters = {}, dict(model.named_parameters())
    if optimizer.state.keys() - set(parameters.values()):
        raise ValueError(
            f"optimizer {type(optimizer).__name__} keeps a state that is no parameter's, and a checkpoint holds the"
            " parameters' and the groups' alone; choose another optimizer"
        )
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and not value.is_complex() and value.layout is torch.strided:
                state[f"{name}/{key}"] = _on_host(value, copy=copy)
            elif isinstance(value, float | int):
                state[f"{name}/{key}{NUMBER}"] = _exact(value)
            elif value is not None:
                kind = f"{value.dtype} tensor" if torch.is_tensor(value) else type(value).__name__
                raise ValueError(
                    f"optimizer {type(optimizer).__name__} keeps a {kind} as {key!r}, and a checkpoint holds plain"
                    " tensors of real numbers and numbers alone; choose another optimizer"
                )
    for name, group in _groups(optimizer).items():
        for key in group.keys() - OF_THE_RECIPE:
            if isinstance(group[key], float | int) and group[key] != optimizer.defaults.get(key):
                state[f"{name}/{key}{NUMBER}"] = _exact(group[key])
    return state


def load_optimizer(optimizer: Optimizer, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` took.

    Raises:
        KeyError: for a state of another model's.

    >>> model = nn.Linear(2, 1)
    >>> load_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, {})
    """
    parameters, groups = dict(model.named_parameters()), _groups(optimizer)
    for key, value in state.items():
        name, _, part = key.rpartition("/")
        if part.endswith(NUMBER):
            kept: Any = groups[name] if name in groups else optimizer.state[parameters[name]]
            key = part.removesuffix(NUMBER)
            if name in groups and key in OF_THE_RECIPE:
                raise KeyError(part)
            kept[key] = value.item()
            continue
        parameter = parameters[name]
        on_host = part == "step" and not getattr(optimizer, "_step_supports_amp_scaling", False)
        if not on_host and value.shape == parameter.shape:  # a fused optimizer pairs the two by their places in memory
            value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        elif not on_host:
            value = value.to(parameter.device)
        known = optimizer.state[parameter].get(part)
        if torch.is_tensor(known):
            known.copy_(value)
        else:
            optimizer.state[parameter][part] = value


def digest_of(*states: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names.

    >>> digest_of({"a": torch.zeros(2)}) == digest_of({"a": torch.zeros(2)})
    True
    """
    digest = hashlib.sha256()
    for state in states:
        for name in sorted(state):
            tensor = state[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _groups(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    return {f"group {number}": group for number, group in enumerate(optimizer.param_groups)}


def _exact(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)


def _on_host(tensor: Tensor, *, copy: bool) -> Tensor:
    tensor = tensor.detach()
    shares = tensor.untyped_storage().nbytes() != tensor.nbytes  # a view: safetensors would write all of its memory
    return tensor.to("cpu", copy=copy or shares).contiguous()

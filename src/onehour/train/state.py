"""What a run consists of between two iterations, as tensors by name: weights, statistics, velocity."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["digest_of", "load_optimizer", "model_state", "optimizer_state"]


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

    >>> model = nn.Linear(2, 1)
    >>> optimizer_state(torch.optim.SGD(model.parameters(), lr=0.1), model)
    {}
    """
    return {
        f"{name}/{key}": _on_host(value, copy=copy) if torch.is_tensor(value) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }


def load_optimizer(optimizer: Optimizer, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` took.

    >>> model = nn.Linear(2, 1)
    >>> load_optimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, {})
    """
    parameters = dict(model.named_parameters())
    for key, value in state.items():
        name, _, part = key.rpartition("/")
        parameter = parameters[name]
        on_host = part == "step" and not getattr(optimizer, "_step_supports_amp_scaling", False)
        value = value if on_host else value.to(parameter.device)
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


def _on_host(tensor: Tensor, *, copy: bool) -> Tensor:
    tensor = tensor.detach()
    shares = tensor.untyped_storage().nbytes() != tensor.nbytes  # a view: safetensors would write all of its memory
    return tensor.to("cpu", copy=copy or shares).contiguous()

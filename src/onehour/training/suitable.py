"""What a model and an optimizer of someone's must be, found before the first iteration: a run must save them.

A model's training output is told from shapes alone, on a copy without memory, so that nothing of it moves.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from onehour.config import Recipe
from onehour.messages import blame
from onehour.training.state import load_optimizer, model_state, optimizer_state

__all__ = ["refuse_model", "refuse_optimizer"]

STEPS = 12
"""Of the trial, before what the optimizer keeps is saved and after."""
SHAPES = ((3, 2, 3, 3), (3,), (4, 12), (4,))
"""Of the trial's parameters: a convolution's and a linear layer's."""


def refuse_model(model: nn.Module, recipe: Recipe, image: Tensor) -> None:
    """Say why a model cannot be saved, or cannot be trained for what it returns in training.

    Args:
        model: converted.
        image: as the model takes it, (C, H, W).

    Raises:
        ValueError: naming what is wrong.

    >>> refuse_model(nn.ParameterDict({"phase": torch.ones(2, dtype=torch.complex64)}), Recipe(), torch.zeros(2))
    Traceback (most recent call last):
    ValueError: the model keeps phase as torch.complex64, and runs hold real numbers alone: use torch.view_as_real
    """
    for name, value in model.state_dict().items():
        if not torch.is_tensor(value):
            raise ValueError(
                f"the model keeps {name}, a {type(value).__name__}, and a checkpoint holds tensors alone: register"
                " it as a buffer"
            )
        if value.is_complex():
            raise ValueError(
                f"the model keeps {name} as {value.dtype}, and runs hold real numbers alone: use torch.view_as_real"
            )
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            kind = "without memory" if value.is_meta else "quantized" if value.is_quantized else f"as {value.layout}"
            raise ValueError(f"the model keeps {name} {kind}, and a checkpoint holds plain tensors alone")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("the model has no parameter that is trained; requires_grad is off in all of them")
    _refuse_training_output(model, recipe, image)


def _refuse_training_output(model: nn.Module, recipe: Recipe, image: Tensor) -> None:
    """What a model returns in training, where its copy without memory can tell; else its first pass does."""
    bare = {id(tensor): _bare(tensor) for tensor in chain(model.parameters(), model.buffers())}
    batch = torch.empty((recipe.per_worker, *image.shape), dtype=image.dtype, device="meta")
    try:
        with torch.random.fork_rng(devices=[]):
            logits = copy.deepcopy(model, dict(bare)).train()(batch)
    except Exception:  # it computes with the values
        return
    if not torch.is_tensor(logits) or logits.ndim != 2:
        shape = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise ValueError(
            f"the model returned {shape} in training; expected logits of shape (N, classes): leave its auxiliary"
            " outputs out"
        )


def _bare(tensor: Tensor) -> Tensor:
    bare = torch.empty_like(tensor, device="meta")
    return nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare


def refuse_optimizer(make: Callable[[nn.Module], Optimizer], device: torch.device) -> None:
    """Say why a run with an optimizer could not go on from what a checkpoint holds.

    On parameters of a few numbers: steps that are interrupted and go on from the saved state must end as those that
    are not, and nothing else may change in a step than what is saved.

    Args:
        make: builds it for a model.
        device: where it will work.

    Raises:
        ValueError: naming what it keeps elsewhere.

    >>> refuse_optimizer(lambda model: torch.optim.Adam(model.parameters()), torch.device("cpu"))
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        through, broken, after = (_Trial(make, device) for _ in range(3))
        name = type(through.optimizer).__name__
        through.step(1)
        before = through.kept()
        through.step(STEPS - 1, first=1)
        kept = through.kept()
        broken.step(STEPS)
        state = optimizer_state(broken.optimizer, broken.model)
        changed = [what for what in kept if what not in before or not _same(before[what], kept[what])]
        if changed:
            raise ValueError(
                f"optimizer {name} changes its {changed[0]} in a step, which no checkpoint holds: keep it in the"
                " parameters' state as a tensor or a number, or choose another optimizer"
            )
        after.model.load_state_dict(model_state(broken.model))
        load_optimizer(after.optimizer, after.model, state)
        through.step(STEPS, first=STEPS)
        after.step(STEPS, first=STEPS)
    if not all(map(torch.equal, through.model.parameters(), after.model.parameters())):
        raise ValueError(
            f"optimizer {name} does not go on from its saved state as without a stop: it keeps something outside the"
            " parameters' state; choose another optimizer"
        )


class _Trial:
    """An optimizer at work on a few numbers."""

    def __init__(self, make: Callable[[nn.Module], Optimizer], device: torch.device) -> None:
        draws = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(shape, generator=draws).to(device)) for shape in SHAPES]
        self.model = nn.ParameterList(weights)
        self.optimizer = make(self.model)

    def step(self, steps: int, *, first: int = 0) -> None:
        for number in range(first, first + steps):
            draws = torch.Generator().manual_seed(number)
            for parameter in self.model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draws).to(parameter.device)
            torch.manual_seed(number)
            try:
                self.optimizer.step()
            except Exception as error:
                kind = type(self.optimizer).__name__
                raise ValueError(f"optimizer {kind} cannot make a step: {blame(error)}") from error

    def kept(self) -> dict[str, Any]:
        """Copies of what it holds besides the parameters' state and the numbers of its groups."""
        optimizer = self.optimizer
        found = {
            f"attribute {name!r}": value
            for name, value in vars(optimizer).items()
            if name not in ("state", "param_groups", "defaults")
        }
        for group in optimizer.param_groups:
            for key, value in group.items():
                if key != "params" and not isinstance(value, float | int):
                    found[f"group's {key!r}"] = value
        return {what: copied for what, value in found.items() if (copied := _copied(value)) is not None}


def _copied(value: Any) -> Any:
    """A value as it is now; None for what cannot be copied, or is compared in vain."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    try:
        return None if callable(value) else copy.deepcopy(value)
    except Exception:
        return None


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if torch.is_tensor(one):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Mapping):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one.values(), other.values(), strict=True))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    try:
        return bool(one == other) or type(one).__eq__ is object.__eq__
    except Exception:  # an array's comparison is none
        return repr(one) == repr(other)

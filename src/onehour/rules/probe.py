"""What an optimizer does, found by stepping a copy of it with small parameters of its own; its name says nothing.

The optimizer itself, its parameters and whatever it keeps are not touched, nor are hooks called.
"""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

RATE = 1e-2
STEPS = 8
"""Some divide by the gradient's size from a later step on: RAdam from its sixth."""
TOLERANCE = 0.01


@dataclass(frozen=True)
class Probed:
    """What the first parameter of each group moved by in the last step, and its scalar state tensors after it."""

    moved: list[float]
    state: list[dict[str, float]]


def is_adaptive(optimizer: Optimizer) -> bool:
    """Whether its update does not grow with the gradient: it divides by the gradient's own size, or takes its sign.

    Of the gradients g and 2g the second moves a parameter of plain SGD twice as far, with any momentum or weight decay.
    Adam's kind, Adagrad, RMSprop, Lion and Muon do not, nor do LARS and LAMB, whose rate for each layer is divided by
    the norm of its gradient.

    Raises:
        ValueError: if the optimizer cannot be probed (its step needs a closure, say).

    >>> parameters = [torch.zeros(1, requires_grad=True)]
    >>> is_adaptive(torch.optim.SGD(parameters, lr=0.1, momentum=0.9)), is_adaptive(torch.optim.Adam(parameters))
    (False, True)
    """
    still, single, double = (
        probe(optimizer, rates=[RATE] * STEPS, gradients=[g] * STEPS, weight=1.0).moved for g in (0.0, 1.0, 2.0)
    )
    moves = [(b - a, c - a) for a, b, c in zip(still, single, double, strict=True)]
    return any(abs(twice - 2 * once) > TOLERANCE * abs(2 * once) for once, twice in moves)


@torch.no_grad()
def probe(optimizer: Optimizer, *, rates: Sequence[float], gradients: Sequence[float], weight: float = 0.0) -> Probed:
    """Step a copy once at each rate, with that step's gradient, from parameters of one element."""
    try:
        try:
            parameters, before, state = _stepped(optimizer, rates, gradients, weight, kept=False)
        except KeyError:  # it makes its state in its constructor, as Adagrad did up to torch 2.12
            parameters, before, state = _stepped(optimizer, rates, gradients, weight, kept=True)
    except Exception as error:
        raise ValueError(
            f"optimizer {type(optimizer).__name__} cannot be probed: its step() without arguments failed with"
            f" {type(error).__name__}: {error}; use one whose step needs no closure, and no sparse gradients"
        ) from error
    return Probed(
        moved=[float(new - old) for new, old in zip(parameters, before, strict=True)],
        state=[
            {key: float(value) for key, value in state[parameter].items() if _is_scalar(value)}
            for parameter in parameters
        ],
    )


def _stepped(
    optimizer: Optimizer, rates: Sequence[float], gradients: Sequence[float], weight: float, *, kept: bool
) -> tuple[list[Tensor], list[Tensor], dict[Tensor, dict[str, Any]]]:
    """A copy's parameters after its steps and before the last one, and its state.

    Args:
        kept: whether it begins with what the optimizer keeps for its parameters, set to zero, rather than with nothing.
    """
    twins = _Twins(weight, kept=kept)
    twin = twins.optimizer(optimizer)
    parameters = [group["params"][0] for group in twin.param_groups]
    # The class's own step without torch's wrapper: schedulers patch `step` on the instance, users hang hooks on it or
    # on all optimizers, and every one of those would act on the real thing.
    step = type(optimizer).step
    step = getattr(step, "__wrapped__", step) if getattr(step, "hooked", False) else step
    before = parameters
    with torch.random.fork_rng(devices=[]):
        for rate, gradient in zip(rates, gradients, strict=True):
            before = [parameter.clone() for parameter in parameters]
            for group in twin.param_groups:
                group["lr"] = torch.full_like(group["lr"], rate) if torch.is_tensor(group["lr"]) else rate
            for parameter in twins.parameters:
                parameter.grad = torch.full_like(parameter, gradient)
            step(twin)  # type: ignore[call-arg]
    return parameters, before, twin.state


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself behind wrappers such as Accelerate's, which forward every attribute to it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


class _Twins:
    """Copies of optimizers and of what they keep, in which each parameter is one of a single element.

    Whatever several of them share is shared by their copies: a wrapper's groups are those of the optimizer in it.
    """

    def __init__(self, weight: float, *, kept: bool) -> None:
        self.weight, self.kept = weight, kept
        self.parameters: list[Tensor] = []
        self._shapes: set[torch.Size] = set()
        self._known: dict[int, Any] = {}
        self._kept: list[Any] = []
        """So that no other thing gets the id of one that is gone."""

    def optimizer(self, real: Optimizer) -> Any:
        twin = object.__new__(type(real))  # copy.copy would drop a custom optimizer's own attributes
        self._know(real, twin)
        self._shapes |= {p.shape for group in real.param_groups for p in group["params"]}
        twin.param_groups = [self._group(group) for group in real.param_groups if group["params"]]
        twin.state = defaultdict(dict)
        if self.kept:
            for group in real.param_groups:
                for parameter in group["params"][:1]:
                    twin.state[self._parameter(parameter)] = {
                        key: torch.zeros_like(self._tensor(value)) if isinstance(value, Tensor) else value
                        for key, value in real.state.get(parameter, {}).items()
                    }
        for name, value in vars(real).items():
            if name not in ("param_groups", "state"):
                twin.__dict__[name] = self._copied(value)
        return twin

    def _group(self, real: dict[str, Any]) -> dict[str, Any]:
        if id(real) in self._known:
            return self._known[id(real)]
        without_decay = {"weight_decay": 0.0} if "weight_decay" in real else {}
        others = {key: self._copied(value) for key, value in real.items() if key != "params"}
        return self._know(real, {**others, **without_decay, "params": [self._parameter(real["params"][0])]})

    def _parameter(self, real: Tensor) -> Tensor:
        if id(real) not in self._known:
            # In float32 at least, so that no step is lost in a weight's last bits.
            dtype = torch.promote_types(real.dtype, torch.float32)
            one = torch.full((1,) * real.ndim, self.weight, dtype=dtype, device=real.device)
            self.parameters.append(self._know(real, torch.nn.Parameter(one)))
        return self._known[id(real)]

    def _tensor(self, real: Tensor) -> Tensor:
        """A copy; of what has a parameter's shape, such as an average of it, one element."""
        if real.shape not in self._shapes or not real.numel():
            return real.clone()
        return real.reshape(-1)[:1].clone().reshape((1,) * real.ndim)

    def _copied(self, value: Any) -> Any:
        if id(value) in self._known:
            return self._known[id(value)]
        if isinstance(value, Optimizer):
            return self.optimizer(value)
        if isinstance(value, Tensor):
            return self._parameter(value) if value.requires_grad else self._know(value, self._tensor(value))
        if isinstance(value, dict):
            twin = self._know(value, copy.copy(value))
            items = [(self._copied(key), self._copied(inner)) for key, inner in value.items()]
            twin.clear()
            twin.update(items)
            return twin
        if isinstance(value, list | set | deque):
            twin = self._know(value, copy.copy(value))
            items = [self._copied(inner) for inner in value]
            twin.clear()
            (twin.update if isinstance(twin, set) else twin.extend)(items)
            return twin
        return tuple(map(self._copied, value)) if type(value) is tuple else value

    def _know(self, real: Any, twin: Any) -> Any:
        self._known[id(real)] = twin
        self._kept.append(real)
        return twin


def _is_scalar(value: Any) -> bool:
    return torch.is_tensor(value) and value.numel() == 1 and value.is_floating_point()

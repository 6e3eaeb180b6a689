"""Optimizers and their steps: rates, what the gradients were, and whether anyone touched the velocity between.

What kind an optimizer is, is found by stepping a copy: never by its name, and never with the user's own state.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import unserializable_hook

from onehour.check.observe.digests import chosen_parameters, leading, projections
from onehour.check.observe.internals import step_unseen
from onehour.check.observe.recorder import Numbering, Patches, TapeRecorder, nothing, quiet
from onehour.check.observe.source import maker_line, user_line
from onehour.check.story import ratio
from onehour.check.tape import OptimizerSeen, OptimizerStep, ParameterGroup
from onehour.rules.momentum import momentum_form, velocity_inside
from onehour.rules.probe import is_adaptive

RATE = 1e-2  # of a copy's step, where the optimizer says none


@dataclass(frozen=True)
class _Before:
    """What was there as a step began, of the chosen parameters."""

    weights: list[Tensor]
    gradients: list[Tensor | None]
    final: list[float]
    kept: dict[str, float]


class _Watched:
    """What is kept of one optimizer from step to step; its parameters are a few chosen ones."""

    def __init__(self, optimizer: Optimizer, number: int) -> None:
        self.number = number
        self.parameters = chosen_parameters(p for group in optimizer.param_groups for p in group["params"])
        self.steps = 0
        self.local: list[float] = []
        self.clipped: list[float] | None = None
        self.left: list[dict[str, Any]] = []
        self.rates: list[float] = []
        self.before: _Before | None = None
        self.hooks = Patches()
        self.kind: dict[str, Any] = {}  # see `character`


class Optimizers:
    """Watches the steps of every optimizer, or of `only` one."""

    def __init__(self, recorder: TapeRecorder, only: Optimizer | None = None) -> None:
        self.recorder, self.only = recorder, only
        self.numbers = Numbering()
        self.made: WeakKeyDictionary[Optimizer, str | None] = WeakKeyDictionary()
        self.watched: dict[Optimizer, _Watched] = {}
        """They stay until the run was judged: a loop may drop its optimizer before its model."""
        self.others: WeakSet[Optimizer] = WeakSet()  # those that step, and are not the one to watch
        self.stepping: list[Optimizer] = []
        """Whose steps are under way: a step may call that of its base class, or another optimizer's."""
        self.round: set[int] = set()
        """Which have stepped since an update was counted last: several that take turns make one update."""
        self.probing = False
        self.on_before: Callable[[Optimizer], object] = nothing
        self.on_step: Callable[[Optimizer], object] = nothing  # called before and after each step

    def install(self, patches: Patches) -> None:
        patches.callback(register_optimizer_step_pre_hook(self._before).remove)
        patches.callback(register_optimizer_step_post_hook(self._after).remove)
        patches.beside(Optimizer, "__init__", after=self._was_made)
        for owner in (torch.nn.utils, torch.nn.utils.clip_grad):
            for name in ("clip_grad_norm_", "clip_grad_value_"):
                patches.beside(owner, name, before=self._clipping)
        if self.only is not None:
            self._watch(self.only)

    @quiet
    def _was_made(self, optimizer: Optimizer, *arguments: Any, **options: Any) -> None:
        self.made[optimizer] = maker_line(optimizer)
        self.recorder.on_made()
        if self.only is None:
            self._watch(optimizer)

    def _watch(self, optimizer: Optimizer) -> _Watched:
        watched = self.watched.get(optimizer)
        if watched is None:
            watched = self.watched[optimizer] = _Watched(optimizer, self.numbers.of(optimizer))
            self.recorder.patches.callback(watched.hooks.close)
            watched.local = projections([None] * len(watched.parameters))
            for index, parameter in enumerate(watched.parameters):
                arrived = unserializable_hook(partial(self._arrived, watched, index))
                watched.hooks.callback(parameter.register_hook(arrived).remove)
        return watched

    @quiet
    def _arrived(self, watched: _Watched, index: int, gradient: Tensor) -> None:
        """A backward pass reached a parameter: its own share, before anything is added, reduced or clipped."""
        numbers = projections([gradient])
        for offset, number in enumerate(numbers):
            watched.local[index * len(numbers) + offset] += number

    def deep(self, watched: _Watched) -> bool:
        """Whether the next step of an optimizer is still looked at in full."""
        return watched.steps < self.recorder.deep_updates

    @quiet
    def _clipping(self, *arguments: Any, **options: Any) -> None:
        for watched in self.watched.values():
            if self.deep(watched) and watched.clipped is None:
                watched.clipped = projections([p.grad for p in watched.parameters])

    def before_backward(self) -> dict[str, list[float]]:
        """The gradients that lie there as a backward pass begins: nothing, or what was not cleared."""
        return {
            str(watched.number): projections([p.grad for p in watched.parameters])
            for watched in self.watched.values()
            if self.deep(watched)
        }

    def after_backward(self) -> dict[str, list[float]]:
        """What a backward pass has given the chosen parameters on this process, before any reduction."""
        given = {}
        for watched in self.watched.values():
            if self.deep(watched):
                given[str(watched.number)] = watched.local
                watched.local = [0.0] * len(watched.local)
            watched.clipped = None  # what was clipped before is not what a step takes
        return given

    @quiet
    def _before(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if self.probing:
            return
        if self.only is not None and optimizer is not self.only:
            self.others.add(optimizer)
            return
        self.stepping.append(optimizer)
        if sum(other is optimizer for other in self.stepping) > 1:
            return
        self.on_before(optimizer)
        watched = self._watch(optimizer)
        if not self.deep(watched):
            return
        watched.before = _Before(
            weights=[leading(p) for p in watched.parameters],
            gradients=[None if p.grad is None else leading(p.grad) for p in watched.parameters],
            final=projections([p.grad for p in watched.parameters]),
            kept=_kept(watched.left, [state_of(optimizer, p) for p in watched.parameters]),
        )

    @quiet
    def _after(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        if self.probing or (self.only is not None and optimizer is not self.only):
            return
        if self.stepping and self.stepping.pop() is optimizer and any(other is optimizer for other in self.stepping):
            return
        self.probing = True
        try:
            self._stepped(optimizer, arguments, options)
        finally:
            self.probing = False
        self.on_step(optimizer)
        self.recorder.on_step()

    def _stepped(self, optimizer: Optimizer, arguments: Any, options: Any) -> None:
        watched = self._watch(optimizer)
        if not watched.kind:
            self._describe(optimizer, watched)
        closure = any(callable(value) for value in (*arguments[1:], *options.values()))
        rates = [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
        momenta = [float(m) for group in optimizer.param_groups if isinstance(m := group.get("momentum"), float | int)]
        step = OptimizerStep(user_line() if self.recorder.attentive else None, watched.number, rates, momenta, closure)
        if self.deep(watched):
            step = self._looked(step, optimizer, watched)
        watched.steps += 1
        watched.rates = rates
        if not self.round or watched.number in self.round:
            self.recorder.updates += 1
            self.round.clear()
        self.round.add(watched.number)
        if not self.deep(watched):
            watched.hooks.close()
            watched.before, watched.left = None, []
        self.recorder.tape.add(step)

    def _looked(self, step: OptimizerStep, optimizer: Optimizer, watched: _Watched) -> OptimizerStep:
        before, parameters = watched.before, watched.parameters
        every = [p for group in optimizer.param_groups for p in group["params"]]
        with_gradient = sum(p.grad is not None for p in every)
        left = projections([p.grad for p in parameters])
        step = replace(step, with_gradient=with_gradient, parameters=len(every), left=left)
        if before is not None:
            moved = projections([leading(p) - w for p, w in zip(parameters, before.weights, strict=True)])
            step = replace(step, final=left if step.closure else before.final, kept=before.kept, moved=moved)
            if before.kept and step.rates != watched.rates and not step.closure:
                step = replace(step, off=self._off(optimizer, watched, before, step.rates))
        if watched.clipped is not None:
            step, watched.clipped = replace(step, final=watched.clipped), None
        watched.left = [state_of(optimizer, p) for p in parameters]
        return step

    def _off(self, optimizer: Optimizer, watched: _Watched, before: _Before, rates: list[float]) -> list[float]:
        """How far the update lies from eq 9 and from eq 10, recomputed in float64 from the state as the last step left
        it: as it is, and scaled by η′/η."""
        owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        picked = [i for i, gradient in enumerate(before.gradients) if gradient is not None]
        parameters, weights = [watched.parameters[i] for i in picked], [before.weights[i] for i in picked]
        gradients = [gradient for gradient in before.gradients if gradient is not None]
        moved = torch.cat([leading(p) - w for p, w in zip(parameters, weights, strict=True)])
        keys = watched.kind["velocity"] or _velocities(watched.left)
        factor = rates[0] / watched.rates[0] if watched.rates and watched.rates[0] else 1.0
        distances = []
        for scale in (1.0, factor):
            states = [
                {key: value * scale if key in keys else value for key, value in watched.left[i].items()} for i in picked
            ]
            right = torch.cat(replay(optimizer, weights, gradients, states, [owner[id(p)] for p in parameters]))
            size = float(right.norm())
            distances.append(float((moved - right).norm()) / size if size else 0.0)
        return distances

    def _describe(self, optimizer: Optimizer, watched: _Watched) -> None:
        watched.kind = character(optimizer)
        groups = [
            ParameterGroup(
                weight_decay=float(group.get("weight_decay") or 0.0),
                momentum=float(group["momentum"]) if isinstance(group.get("momentum"), float | int) else 0.0,
                parameters=len(group["params"]),
            )
            for group in optimizer.param_groups
        ]
        self.recorder.tape.add(OptimizerSeen(self.made.get(optimizer), watched.number, groups, **watched.kind))


def _velocities(states: list[dict[str, Any]]) -> set[str]:
    """State tensors of a weight's shape that may be a velocity: all but second moments."""
    names = {key for state in states for key, value in state.items() if torch.is_tensor(value) and value.ndim}
    return {name for name in names if "sq" not in name}


def _kept(left: list[dict[str, Any]], now: list[dict[str, Any]]) -> dict[str, float]:
    """How each state tensor was scaled since the last step left it; 1 where nobody touched it."""
    scaled = {}
    for key in _velocities(left):
        pairs = [(a[key], b[key]) for a, b in zip(now, left, strict=True) if key in a and key in b]
        c, rest = ratio(projections([a for a, _ in pairs]), projections([b for _, b in pairs])) if pairs else (0.0, 1.0)
        if rest < 1e-3:
            scaled[key] = c
    return scaled


def character(optimizer: Optimizer) -> dict[str, Any]:
    """What kind of optimizer it is; a key is None where the copy could not be stepped.

    Returns:
        form: "outside" or "inside": where the velocity keeps the rate (Remark 2).
        velocity: names of the state tensors that hold the rate.
        adaptive: whether a larger gradient makes no larger step, as in Adam.
        decay: for each group with weight decay, how much a weight of 1 shrinks in a step at the group's rate, or at
            its initial one if a warmup lies below it, and at twice that rate, the initial rate doubled too.
    """
    found: dict[str, Any] = {"form": None, "velocity": [], "adaptive": None, "decay": []}
    looks = {"form": momentum_form, "adaptive": is_adaptive, "decay": _decay, "velocity": velocity_inside}
    for key, look in looks.items():
        # Any optimizer may refuse to be stepped so; then nothing is claimed of it.
        with warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            found[key] = look(optimizer)
    return found | {"velocity": sorted(found["velocity"])}


def _decay(optimizer: Optimizer) -> list[list[float]]:
    pairs = []
    for group in optimizer.param_groups:
        if not group.get("weight_decay") or not group["params"]:
            continue
        shrunk = []
        rate = max(float(group.get("lr", 0.0)), float(group.get("initial_lr", 0.0))) or RATE
        for factor in (1.0, 2.0):
            copied, (parameter,) = _copied(optimizer, [group], [torch.ones(1)], factor)
            if "lr" in group:
                copied.param_groups[0]["lr"] = rate * factor
            parameter.grad = torch.zeros_like(parameter)
            step_unseen(copied)
            shrunk.append(1 - float(parameter.detach()[0]))
        pairs.append(shrunk)
    return pairs


def replay(
    optimizer: Optimizer,
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    owners: Sequence[dict[str, Any]],
) -> list[Tensor]:
    """How far a step moves each weight, computed by a copy of the optimizer in float64.

    Args:
        weights, gradients: flat float64 tensors of equal shapes, pairwise.
        states: the optimizer's state of each weight before the step, its tensors in the same shape.
        owners: the parameter group of each weight.
    """
    copied, parameters = _copied(optimizer, owners, weights)
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        parameter.grad = gradient.clone()
        if state:
            copied.state[parameter] = {key: copy.deepcopy(value) for key, value in state.items()}
    step_unseen(copied)
    return [p.detach() - w for p, w in zip(parameters, weights, strict=True)]


def state_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The optimizer's state of a parameter, tensors of its shape as `leading` has them."""
    state = {}
    for key, value in optimizer.state.get(parameter, {}).items():
        if torch.is_tensor(value) and value.shape == parameter.shape and value.is_floating_point():
            state[key] = leading(value)
        else:
            state[key] = value.detach().cpu().clone() if torch.is_tensor(value) else copy.copy(value)
    return state


def _copied(
    optimizer: Optimizer, groups: Sequence[dict[str, Any]], weights: Sequence[Tensor], rate_factor: float = 1.0
) -> tuple[Optimizer, list[torch.nn.Parameter]]:
    """An optimizer of the same class without state, with a group of the settings of each and one weight in float64."""
    copied = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        copied.__dict__[name] = copy.copy(value) if isinstance(value, list | dict | set) else value
        if "lr" in name and isinstance(value, float):
            copied.__dict__[name] = value * rate_factor
    for name in ("grad_scale", "found_inf"):  # of a fused step, which the copy's is not
        copied.__dict__.pop(name, None)
    copied.state = defaultdict(dict)
    copied.param_groups, parameters = [], [torch.nn.Parameter(weight.clone().double()) for weight in weights]
    for group, parameter in zip(groups, parameters, strict=True):
        own = {key: _scaled(key, value, rate_factor) for key, value in group.items()}
        own |= {key: False for key in ("fused", "foreach", "capturable", "differentiable") if key in own}
        copied.param_groups.append(own | {"params": [parameter]})
    return copied, parameters


def _scaled(key: str, value: Any, factor: float) -> Any:
    if "lr" not in key:
        return value
    if torch.is_tensor(value):
        return value.detach().cpu().clone() * factor
    return value * factor if isinstance(value, float) else value

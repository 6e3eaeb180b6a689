"""Losses and backward passes: with what weight each sample enters the gradient (§3, Remark 3)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onehour.check.observe.digests import in_a_graph
from onehour.check.observe.internals import exponent
from onehour.check.observe.loader import Loaders
from onehour.check.observe.optimizer import Optimizers
from onehour.check.observe.recorder import Patches, TapeRecorder, quiet
from onehour.check.observe.source import called_directly, user_line
from onehour.check.tape import MEANS, BackwardPass, LossTerm

NODES = 20_000  # of a graph; what is larger is not searched further

_SQUARES = ("PowBackward0", "MulBackward0", "SquareBackward0")
_NORMS = ("LinalgVectorNormBackward0", "NormBackward0", "NormBackward1", "NormBackward2", "NormBackward3")
_SHAPES = ("ViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0", "UnsafeViewBackward0", "CatBackward0")
_THROUGH = (
    *("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "NegBackward0", "SumBackward0", "SumBackward1"),
    *("MeanBackward0", "MeanBackward1", "SqrtBackward0", "PowBackward0", "StackBackward0", "SqueezeBackward0"),
    *("UnsqueezeBackward0", "SelectBackward0", "ExpandBackward0", "AliasBackward0", "CloneBackward0"),
    *(*_SHAPES, *_NORMS, "SquareBackward0", "DotBackward0"),
)
"""What may lie between a penalty and the loss: no layer, and no loss over samples."""


class Penalty:
    """The square or norm of parameters in a loss, and how strong it is once the backward pass went through."""

    def __init__(self, node: Any, parameters: list[Tensor]) -> None:
        self.norm = node.name() in _NORMS
        self.parameters, self.decay = parameters, 0.0
        self.handle = node.register_prehook(self._seen)

    def _seen(self, gradients: tuple[Any, ...]) -> None:
        if gradients[0] is not None:
            received = float(gradients[0].detach().double().mean())
            # Here, not after the pass: `fully_shard` has freed the whole parameter by then, and reading it would crash.
            size = math.hypot(*(float(p.detach().double().norm()) for p in self.parameters)) if self.norm else 0.5
            self.decay = received / max(size, 1e-30)

    def strength(self, scale: float = 1.0) -> float:
        """λ: the gradient that it adds is λ·w, after a GradScaler's scale is taken out."""
        self.handle.remove()
        return self.decay / scale


def penalties(root: Tensor) -> list[Penalty]:
    """The parameters whose squares or norms are added to a loss beside what the model computes."""
    found: dict[int, Penalty] = {}
    seen: set[Any] = set()
    waiting = [root.grad_fn] if root.grad_fn is not None else []
    while waiting and len(seen) < NODES:
        node = waiting.pop()
        if node in seen or node.name() not in _THROUGH:
            continue
        seen.add(node)
        name, behind = node.name(), [n for n, _ in node.next_functions if n is not None]
        leaves = [_leaves(n) for n in behind]
        square = name in _SQUARES or name in _NORMS
        if name == "MulBackward0":
            square = len(leaves) == 2 and [*map(id, leaves[0])] == [*map(id, leaves[1])]
        elif name == "PowBackward0" or name in _NORMS:
            square = exponent(node) == 2
        parameters = leaves[0] if leaves else []
        if square and any(p.ndim > 0 for p in parameters) and id(parameters[0]) not in found:
            found[id(parameters[0])] = Penalty(node, parameters)
        waiting += behind
    return list(found.values())


def _leaves(node: Any, depth: int = 4) -> list[Tensor]:
    """The parameters that a node gives as they are, in another shape or one behind another; none if it does more."""
    if node is not None and node.name() == "torch::autograd::AccumulateGrad":
        return [node.variable] if torch.is_tensor(node.variable) else []
    if not depth or node is None or node.name() not in _SHAPES:
        return []
    parts = [_leaves(behind, depth - 1) for behind, _ in node.next_functions]
    return [p for part in parts for p in part] if all(parts) else []


LOSSES = (
    *("cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "mse_loss", "l1_loss"),
    *("smooth_l1_loss", "huber_loss", "kl_div", "multi_margin_loss", "multilabel_soft_margin_loss"),
)


class Backwards:
    """Watches the losses of torch.nn.functional and every backward pass.

    A hook on each loss's output learns with what factor the backward pass came to it, whatever the loop did to the
    loss on the way: dividing by the batches of a window, multiplying by the world size, a GradScaler's scale.
    """

    def __init__(self, recorder: TapeRecorder, optimizers: Optimizers, loaders: Loaders) -> None:
        self.recorder, self.optimizers, self.loaders = recorder, optimizers, loaders
        self.evaluations = loaders.evaluations
        self.inside = 0
        self.running = False
        """Whether a backward pass runs: what a checkpoint runs again within it, its own backward too, is none."""
        self.terms: list[LossTerm] = []
        self.scale = 1.0
        self.samples: int | None = None  # of the training pass before: the outermost module's first input
        self.content: list[float] | None = None
        self.carried = False

    def install(self, patches: Patches) -> None:
        for name in LOSSES:
            patches.around(F, name, self._loss_named(name))
        patches.around(torch.autograd, "backward", self._backward)
        patches.beside(torch.amp.GradScaler, "scale", after=self._scaled)

    def _loss_named(self, name: str) -> Any:
        def loss(original: Any, *arguments: Any, **options: Any) -> Any:
            if self.inside or not self.recorder.attentive or self.recorder.finished or in_a_graph():
                return original(*arguments, **options)
            self.inside += 1
            try:
                value = original(*arguments, **options)
            finally:
                self.inside -= 1
            self._called(name, value, arguments, options)
            return value

        return loss

    @quiet
    def _called(self, name: str, value: Any, arguments: Any, options: Any) -> None:
        if not torch.is_tensor(value) or not (value.requires_grad or self.recorder.cut):
            return
        reduction, count, divisor = "none", None, None
        if value.ndim == 0:
            older = {True: "mean", False: "sum"}.get(options.get("size_average"))
            reduction = older or options.get("reduction", "mean")
            if reduction not in (*MEANS, "sum"):
                return
            count, divisor = _counts(name, arguments, options)
        if not value.requires_grad:
            if reduction in MEANS and divisor:
                self.evaluations.lost(float(value), divisor)
            return
        term = LossTerm(name, user_line(), reduction, count)
        value.register_hook(lambda gradient: self._reached(term, gradient))

    @quiet
    def _reached(self, term: LossTerm, gradient: Tensor) -> None:
        """The factor of a loss in what the backward pass began with, divided among its samples."""
        gradient = gradient.detach().double() / self.scale
        if term.reduction == "none":
            used = gradient[gradient != 0]
            if not used.numel():
                return
            count, total, low, high = used.numel(), float(used.sum()), float(used.min()), float(used.max())
        else:
            factor, count = float(gradient), term.count
            low = high = factor / count if term.reduction in MEANS and count else factor
            total = low * (count or 1)
        if all(math.isfinite(weight) for weight in (total, low, high)):
            self.terms.append(replace(term, count=count, total=total, low=low, high=high))

    @quiet
    def _scaled(self, scaler: Any, outputs: Any) -> None:
        self.scale = float(scaler.get_scale()) if scaler.is_enabled() else 1.0

    def _backward(self, original: Any, tensors: Any, *arguments: Any, **options: Any) -> Any:
        if self.recorder.finished or self.running:
            return original(tensors, *arguments, **options)
        before, penalized = self._begins(tensors) or ({}, [])
        self.running = True
        try:
            result = original(tensors, *arguments, **options)
        finally:
            self.running = False
        self._ended(before, penalized)
        return result

    @quiet
    def _begins(self, tensors: Any) -> tuple[dict[str, list[float]], list[Penalty]]:
        """The gradients that lie there, and the parameters whose squares or norms are in the loss."""
        self.terms = []
        self.loaders.trains_on()
        if not self.recorder.attentive:
            return {}, []
        root = tensors if torch.is_tensor(tensors) else tensors[0]
        deep = self.recorder.backwards < self.recorder.deep_updates
        return self.optimizers.before_backward(), penalties(root) if deep else []

    @quiet
    def _ended(self, before: dict[str, list[float]], penalized: list[Penalty]) -> None:
        self.recorder.backwards += 1
        if not self.recorder.attentive:
            self.recorder.tape.add(BackwardPass(samples=self.samples))
            return
        strengths = [penalty.strength(self.scale) for penalty in penalized]
        self.recorder.tape.add(
            BackwardPass(
                user_line(),
                terms=self.terms,
                samples=self.samples,
                scale=self.scale,
                before=before,
                local=self.optimizers.after_backward(),
                content=None if self.carried else self.content,
                carried=self.carried,
                direct=called_directly(),
                penalized=sum(len(penalty.parameters) for penalty in penalized),
                penalty=max(strengths, default=0.0),
            )
        )
        self.terms, self.scale, self.samples, self.content, self.carried = [], 1.0, None, None, False


def _counts(name: str, arguments: Any, options: Any) -> tuple[int | None, float | None]:
    """A loss's labels without the ignored ones, and what a mean divides by: the weights of their classes, if any."""
    first, target, weight = (
        arguments[place] if len(arguments) > place else options.get(key)
        for place, key in enumerate(("input", "target", "weight"))
    )
    if not torch.is_tensor(target):
        return None, None
    if name in ("cross_entropy", "nll_loss") and not target.is_floating_point():
        kept = target != options.get("ignore_index", -100)
        count = int(kept.sum())
        return count, count if weight is None else float(weight[target[kept]].sum())
    count = target.numel()
    if name == "cross_entropy":
        count = first.numel() // first.shape[1] if first.ndim > 1 else 1
    elif name == "kl_div" and options.get("reduction") == "batchmean":
        count = first.shape[0]
    return count, count

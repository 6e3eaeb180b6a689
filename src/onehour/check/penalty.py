"""Whether a loss holds a penalty on the weights themselves, found in the autograd graph (§3, Remark 1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Penalty", "penalties"]

NODES = 20_000
"""Of a graph; what is larger is not searched further."""

_SQUARES = ("PowBackward0", "MulBackward0", "SquareBackward0")
_NORMS = ("LinalgVectorNormBackward0", "NormBackward0", "NormBackward1", "NormBackward2", "NormBackward3")
_THROUGH = (
    *("AddBackward0", "SubBackward0", "MulBackward0", "DivBackward0", "NegBackward0", "SumBackward0", "SumBackward1"),
    *("MeanBackward0", "MeanBackward1", "SqrtBackward0", "PowBackward0", "StackBackward0", "CatBackward0"),
    *("ToCopyBackward0", "ReshapeAliasBackward0", "ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward0"),
    *("UnsqueezeBackward0", "SelectBackward0", "ExpandBackward0", "AliasBackward0", "CloneBackward0"),
    *(*_NORMS, "SquareBackward0", "DotBackward0"),
)
"""What may lie between a penalty and the loss: no layer, and no loss over samples."""


class Penalty:
    """One parameter's square or norm in a loss, and how strong it is once the backward pass went through."""

    def __init__(self, node: Any, parameter: Tensor) -> None:
        self.norm = node.name() in _NORMS
        self.parameter, self.received = parameter, 0.0
        self.handle = node.register_prehook(self._seen)

    def _seen(self, gradients: tuple[Any, ...]) -> None:
        if gradients[0] is not None:
            self.received = float(gradients[0].detach().double().mean())

    def strength(self, scale: float = 1.0) -> float:
        """λ: the gradient that it adds is λ·w, after a GradScaler's scale is taken out.

        >>> w = torch.ones(2, requires_grad=True)
        >>> loss = 0.05 * w.pow(2).sum()
        >>> (found,) = penalties(loss)
        >>> loss.backward()
        >>> round(found.strength(), 6)
        0.1
        """
        self.handle.remove()
        if self.norm:
            return self.received / max(float(self.parameter.detach().double().norm()), 1e-30) / scale
        return 2 * self.received / scale


def penalties(root: Tensor) -> list[Penalty]:
    """The parameters whose squares or norms are added to a loss beside what the model computes.

    >>> w = torch.ones(2, requires_grad=True)
    >>> len(penalties((w * 3).sum())), len(penalties((w * 3).sum() + w.norm()))
    (0, 1)
    """
    found: dict[int, Penalty] = {}
    seen: set[Any] = set()
    waiting = [root.grad_fn] if root.grad_fn is not None else []
    while waiting and len(seen) < NODES:
        node = waiting.pop()
        if node in seen or node.name() not in _THROUGH:
            continue
        seen.add(node)
        name, behind = node.name(), [n for n, _ in node.next_functions if n is not None]
        leaves = [_leaf(n) for n in behind]
        if name in _SQUARES or name in _NORMS:
            square = name != "MulBackward0" or (len(leaves) == 2 and leaves[0] is leaves[1])
            if name == "PowBackward0":
                square = float(getattr(node, "_saved_exponent", 0)) == 2
            parameter = leaves[0] if leaves else None
            if square and parameter is not None and parameter.ndim > 0 and id(parameter) not in found:
                found[id(parameter)] = Penalty(node, parameter)
        waiting += behind
    return list(found.values())


def _leaf(node: Any) -> Tensor | None:
    """The parameter behind a node, seen through changes of its form and type alone."""
    for _ in range(4):
        if node is None:
            return None
        if node.name() == "torch::autograd::AccumulateGrad":
            return node.variable if torch.is_tensor(node.variable) else None
        if node.name() not in ("ViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0", "UnsafeViewBackward0"):
            return None
        node = node.next_functions[0][0]
    return None

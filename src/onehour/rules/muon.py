"""Muon: momentum whose matrices are orthogonalised before the step (Jordan et al. 2024), past the break.

An optimizer for anyone's loop. `torch.optim.Muon` takes 2-D parameters alone; here convolutions are matrices too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.optim import Optimizer

from onehour.rules.arguments import fraction, not_negative

__all__ = ["Muon", "hidden_weights", "muon_groups", "orthogonalised"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's: singular values come to within about 0.3 of 1, from far below it and in few steps."""
STEPS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U·Vᵀ of G = U·S·Vᵀ, by five steps of Newton–Schulz in G's own precision.

    X₀ = G / (‖G‖ + 10⁻⁷), X ← a·X + (b·A + c·A²)·X with A = X·Xᵀ; of the transpose where G is taller than wide.

    Args:
        matrix: G of shape (rows, columns).

    >>> orthogonalised(torch.tensor([[8.0, 0.0], [0.0, 8.0]])).diagonal().sub(1).abs().max() < 0.3
    tensor(True)
    """
    a, b, c = COEFFICIENTS
    tall = len(matrix) > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.T if tall else x


def hidden_weights(model: nn.Module) -> list[Tensor]:
    """The weights of linear layers and convolutions, but for the first and the last of the model.

    These two meet pixels and classes, each with a scale of its own, and are left to SGD, as biases and γ are. First and
    last are meant in the order of `model.modules()`.
    """
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear | _ConvNd)]
    return [weight for weight in weights[1:-1] if isinstance(weight, nn.Parameter) and weight.requires_grad]


def muon_groups(groups: Sequence[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups divided into what `Muon` orthogonalises, the `hidden_weights`, and the rest.

    Args:
        groups: of the model's trained parameters, as `parameter_groups` gives them.

    Raises:
        ValueError: where there is no hidden weight, so that nothing of Muon would be left.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    >>> groups = muon_groups([{"params": [*model.parameters()]}], model)
    >>> [(group["orthogonal"], len(group["params"])) for group in groups]
    [(False, 5), (True, 1)]
    """
    hidden = {id(weight) for weight in hidden_weights(model)}
    if not hidden:
        raise ValueError(
            f"muon orthogonalises weights between a network's first layer and its last, and {type(model).__name__} has"
            " none that trains; use optimizer sgd"
        )
    divided = [
        {**group, "orthogonal": orthogonal, "params": [p for p in group["params"] if (id(p) in hidden) == orthogonal]}
        for group in groups
        for orthogonal in (False, True)
    ]
    return [group for group in divided if group["params"]]


class Muon(Optimizer):
    """u ← m·u + g; d = u, or with Nesterov g + m·u; w ← (1 − η·λ)·w − η·√max(1, rows/columns)·orthogonalised(d).

    A weight is a matrix of its first dimension by all others. Its update has singular values near 1 whatever the size
    of the gradient, so k times the minibatch asks for no k times the rate, and the linear rule says nothing of it.
    Groups with `orthogonal` false take SGD's step at the same rate, with λ coupled: w ← w − η·d of g + λ·w.

    Args:
        params: parameters or groups, such as `muon_groups`.
        lr, momentum, nesterov, weight_decay: η, m, the form and λ.

    Raises:
        ValueError: for a number out of its range, or a vector that is to be orthogonalised.

    >>> weight = nn.Parameter(torch.eye(2))
    >>> optimizer = Muon([weight], lr=0.1)
    >>> weight.square().sum().backward(); optimizer.step()
    >>> bool((weight.diag() < 1).all())
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": not_negative("lr", lr),
            "momentum": fraction("momentum", momentum, upper=1),
            "nesterov": nesterov,
            "weight_decay": not_negative("weight_decay", weight_decay),
            "orthogonal": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, which also takes a constructor's groups through it."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["orthogonal"] and any(p.ndim < 2 for p in group["params"]):
            raise ValueError("muon orthogonalises matrices; give vectors in a group with orthogonal=False")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient; a closure computes them, and its loss is given back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            for weight in (p for p in group["params"] if p.grad is not None):
                gradient = weight.grad if group["orthogonal"] else weight.grad.add(weight, alpha=decay)
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                velocity = state["momentum_buffer"].mul_(momentum).add_(gradient)
                move = gradient.add(velocity, alpha=momentum) if group["nesterov"] else velocity
                if group["orthogonal"]:
                    weight.mul_(1 - rate * decay)
                    matrix = move.flatten(1)
                    scale = math.sqrt(max(1, len(matrix) / matrix.shape[1]))
                    move = orthogonalised(matrix).mul(scale).view(weight.shape)
                weight.sub_(move, alpha=rate)
        return loss

"""Initial weights from elsewhere: a file, another run, or what timm or torchvision has for one of their models."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onehour.config import Recipe
from onehour.data.sources import Data
from onehour.dist.group import Group
from onehour.entry import LIBRARIES
from onehour.messages import shown
from onehour.models.load import pretrained_weights
from onehour.training.build import outputs_of
from onehour.training.state import digest_of
from onehour.training.store import checkpoint_folders
from onehour.training.weights import bytes_of, few, weights_in

COUNTER = "num_batches_tracked"
"""Of BatchNorm's: younger than many files, and frozen ones have none."""


@dataclass(frozen=True)
class Start:
    """What a model started from.

    Args:
        sha256: of the file; of a library's weights their digest.
        tensors: how many the model has.
        anew: those that the source lacks, which are as without `init`.
        classifier: those that are as without `init` because the source has other classes.
        left_out: those that the source alone has.
        inside: what stands before the source's names in the model's, whose part it is.
    """

    source: str
    sha256: str
    tensors: int
    anew: list[str]
    classifier: list[str]
    left_out: list[str]
    inside: str = ""

    def __str__(self) -> str:
        return "; ".join(self._parts())

    def _parts(self) -> Iterator[str]:
        loaded = self.tensors - len(self.anew) - len(self.classifier)
        yield f"starts from {self.source}, SHA-256 {self.sha256[:16]}…: {loaded} of {self.tensors} tensors" + (
            f", as its {self.inside.removesuffix('.')}" if self.inside else ""
        )
        if self.classifier:
            yield f"{few(self.classifier)} start anew, for another number of classes"
        if self.anew:
            yield f"{few(self.anew)} start anew, since it lacks them"
        if self.left_out:
            yield f"not used: {few(self.left_out)}"

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """What all processes must have in common."""
        return {"init": {f"the SHA-256 of init {self.source}": self.sha256}}

    @property
    def record(self) -> dict[str, Any]:
        """For the run's environment."""
        anew = self.anew + self.classifier
        return {"init": self.source, "init_sha256": self.sha256, "init_anew": anew, "init_left_out": self.left_out}


def has_begun(folder: Path, group: Group) -> bool:
    """Whether a run has a checkpoint, and needs no initial weights; process 0 looks, and all hear it."""
    try:
        begun = group.rank == 0 and bool(checkpoint_folders(folder))
    except (ValueError, OSError):  # which whoever loads it has more to say of
        begun = False
    return bool(group.broadcast(b"begun" if begun else b""))


@torch.no_grad()
def start_from(recipe: Recipe, data: Data, model: nn.Module, device: torch.device) -> Start:
    """Load what `recipe.init` names into a model that is built.

    Raises:
        ValueError: if it cannot be read, shares no tensor with the model or a part of it, is not finite, or has a
            tensor of another shape that is not the classifier's: one whose first dimension is the number of classes in
            both.
    """
    if recipe.init.startswith(tuple(f"{library}:" for library in LIBRARIES)):
        weights = pretrained_weights(recipe.init)
        digest = digest_of(weights)
    else:
        try:
            content = bytes_of(Path(recipe.init))
            weights = weights_in(Path(recipe.init), content)
        except ValueError as error:
            raise ValueError(f"init {error}") from error
        digest = hashlib.sha256(content).hexdigest()
    own = model.state_dict()
    inside = _place(weights, own)
    weights = {inside + name: tensor for name, tensor in weights.items()}
    both = [name for name in own if name in weights]
    other = [name for name in both if own[name].shape != weights[name].shape]
    if other:
        classes = None if recipe.task is not None else outputs_of(model, recipe, data, device)
        wrong = [name for name in other if classes is None or own[name].shape != (classes, *weights[name].shape[1:])]
        if wrong or len({weights[name].shape[:1] for name in other}) > 1:
            name = (wrong or other)[0]
            shapes = f"{tuple(weights[name].shape)} there, and {tuple(own[name].shape)} here"
            raise ValueError(
                f"init {recipe.init} does not fit the model: {shown(name)} is {shapes}; a classifier alone may differ,"
                " by its number of classes"
            )
    loaded = {name: weights[name] for name in both if name not in other}
    if not loaded:
        names = few(list(weights)), few(list(own))
        raise ValueError(f"init {recipe.init} is of another model: it has {names[0]}, the model {names[1]}")
    for name, tensor in loaded.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"init {recipe.init}: {shown(name)} holds NaN or infinity")
    model.load_state_dict(loaded, strict=False)
    counted = [name for name in own if not name.endswith(COUNTER)]
    return Start(
        source=recipe.init,
        sha256=digest,
        tensors=len(counted),
        anew=[name for name in counted if name not in weights],
        classifier=other,
        left_out=[name.removeprefix(inside) for name in weights if name not in own and not name.endswith(COUNTER)],
        inside=inside,
    )


def _place(weights: Collection[str], own: Collection[str]) -> str:
    """What stands before the weights' names where the model has them as a part of it, as a detector has a backbone.

    It is the only such under which most of them are found; nothing where a name fits as it is.
    """
    if any(name in own for name in weights):
        return ""
    found = Counter(mine.removesuffix(name) for name in weights for mine in own if mine.endswith(f".{name}"))
    places = [place for place, count in found.items() if 2 * count > len(weights)]
    return places[0] if len(places) == 1 else ""

"""Where a run starts that does not start from nothing: from weights that are there, or where another run stands.

Weights are a file's, another run's, or a library's for one of its models. A run that goes on from another one is the
same but for the schedule of its rate: it has the other's weights, optimizer and position, in a folder of its own, and
so takes the samples that the other would have taken next.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import nn

from onehour.config import Recipe
from onehour.data.sources import Data, complete
from onehour.dist.group import Group
from onehour.entry import LIBRARIES
from onehour.execution import Execution
from onehour.files import replace_whole
from onehour.messages import say, shown
from onehour.models.load import pretrained_weights
from onehour.rules.schedule import parse_milestones
from onehour.training.build import outputs_of
from onehour.training.checkpoint import latest_contents
from onehour.training.deviations import decisions_of
from onehour.training.record import RECIPE, Run, differences
from onehour.training.recorder import LINES, take_folder
from onehour.training.skipping import BAD_IMAGES
from onehour.training.state import digest_of
from onehour.training.store import Store, checkpoint_folders, digest_of_recipe
from onehour.training.weights import bytes_of, few, weights_in

COUNTER = "num_batches_tracked"
"""Of BatchNorm's: younger than many files, and frozen ones have none."""
MAY_CHANGE = ("epochs", "base_lr", "decay", "decay_factor", "milestones", "warmup", "warmup_epochs", "continues")
"""Fields in which a run may differ from the one that it goes on from."""
BEHIND = " iteration "
"""What stands behind the run's folder in `Recipe.continues`."""


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


def complete_for(
    recipe: Recipe, execution: Execution, data: Any = None, collate: Callable[[list[Any]], Any] | None = None
) -> tuple[Recipe, Data]:
    """As `complete`; the recipe of a run that goes on from `execution.continues` names it."""
    old, folder = execution.continues, execution.folder(recipe)
    if old is None:
        if recipe.continues and (execution.fresh or not checkpoint_folders(folder)):
            raise ValueError(
                f"the recipe goes on from {recipe.continues}, and {folder} has no checkpoint to do so: give that"
                " --continue again, or take the line `continues` out of the recipe to train all of it"
            )
        return complete(recipe, data, collate=collate)
    if folder.resolve() == old.resolve():
        raise ValueError(f"--continue goes on in a new folder, and --out {folder} is the run itself; choose another")
    named = Run(folder).recipe.continues if (folder / RECIPE).is_file() and not execution.fresh else ""
    if named and Path(named.partition(BEHIND)[0]).resolve() == old.resolve():
        recipe, loaded = complete(recipe, data, collate=collate)  # whatever has become of the old run since
        return recipe.replace(continues=named), loaded
    _refuse_changes(old, recipe)
    recipe, loaded = complete(recipe, data, collate=collate)
    _refuse_changes(old, recipe)
    iteration, _, named = _stands(old)
    decisions = decisions_of(recipe)
    if iteration >= decisions.iterations:
        done = iteration * recipe.minibatch / decisions.samples
        raise ValueError(f"{old} has done {done:.4g} epochs, and epochs is {recipe.epochs}; give more --epochs")
    return recipe.replace(continues=named), loaded


def _refuse_changes(old: Path, recipe: Recipe) -> None:
    """Refuse what is no schedule; what only the data says may be unsaid."""
    unsaid = [name for name in ("samples", "classes", "resized") if getattr(recipe, name) is None]
    before = Run(old).recipe
    if before.epochs % 1:
        raise ValueError(
            f"{old} has {before.epochs:g} epochs, and --continue goes on from whole ones alone; train anew from its"
            f" weights: --init {old}"
        )
    changed = differences(before, recipe)
    changed = [text for text in changed if text.partition(":")[0] not in (*MAY_CHANGE, *unsaid)]
    if changed:
        raise ValueError(
            f"--continue changes nothing but the schedule of {old} ({'; '.join(changed)}); leave that out, or train"
            f" anew from its weights: --init {old}"
        )


def go_on_from(recipe: Recipe, execution: Execution) -> None:
    """Let the run's folder be that of one which has come as far as the old run, unless it has a checkpoint.

    For process 0. The checkpoint is written last: without one the folder is not trained in.
    """
    folder = execution.folder(recipe)
    if execution.continues is None or checkpoint_folders(folder):
        return
    old = Run(execution.continues)
    iteration, contents, named = _stands(old.folder)
    if named != recipe.continues:
        raise ValueError(f"{old.folder} has gone on meanwhile; give the same command again")
    before = decisions_of(old.recipe)
    progress = {"rate": before.rate(iteration - 1)} | json.loads(contents[2])
    held = take_folder(folder, recipe, warn=say)
    try:
        for path in (old.folder / name for name in (*LINES, BAD_IMAGES)):
            if path.is_file():
                replace_whole(held.inside, path.name, path.read_bytes())
        store = Store(held.inside, recipe=digest_of_recipe(recipe), shown=folder)
        store.write(iteration, [*contents[:2], json.dumps(progress, indent=2).encode()])
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        held.release()
    say(f"goes on from {old.folder} {changed_schedule(old.recipe, recipe, iteration)}")


def changed_schedule(old: Recipe, new: Recipe, iteration: int) -> str:
    """What the rate of a run that goes on behind `iteration` is from there on, and how it jumps; a line each."""
    assert new.samples is not None
    epoch = iteration * new.minibatch / new.samples
    rate, before = new.schedule(epoch), old.schedule((iteration - 1) * new.minibatch / new.samples)
    parts = [f"at epoch {epoch:.4g} of {new.epochs} with rate {rate:.4g}"]
    if new.warms_up and epoch < new.warmup_epochs:
        parts.append(f"warms up to {new.schedule(new.warmup_epochs):.4g} at epoch {new.warmup_epochs:g}")
    if new.decay == "cosine":
        parts.append(f"falls along a cosine to 0 at epoch {new.epochs}")
    else:
        turns = [milestone for milestone in parse_milestones(new.milestones) if epoch < milestone < new.epochs]
        parts += [f"{new.schedule(float(turn)):.4g} from epoch {turn}" for turn in turns]
    lines = [", ".join(parts)]
    if rate != old.schedule(epoch):
        way = "up" if rate > before else "down"
        shares = f"warmup and decay are those of a run of {new.epochs} epochs"
        lines.append(f"the rate jumps {way} there, from {before:.4g} to {rate:.4g}: {shares}")
        if new.decay == old.decay == "step" and new.milestones != old.milestones:
            lines[-1] += f"; --milestones {','.join(old.milestones)} keeps where the old run drops"
    return "\n".join(lines)


def _stands(folder: Path) -> tuple[int, list[bytes], str]:
    """The iteration of a run's newest checkpoint, its files, and what `Recipe.continues` says of it."""
    contents = latest_contents(folder)
    if contents is None:
        raise ValueError(f"{folder} has no checkpoint to go on from yet")
    iteration = json.loads(contents[2])["iteration"]
    digest = digest_of(load(contents[0]), load(contents[1]))
    return iteration, contents, f"{folder}{BEHIND}{iteration} state {digest}"

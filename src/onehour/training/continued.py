"""A run that goes on from another one, in a folder of its own: the same but for the schedule of its rate.

It has the other's weights, optimizer and position, and so takes the samples that the other would have taken next.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load

from onehour.config import Recipe
from onehour.data.sources import Data
from onehour.execution import Execution
from onehour.files import replace_whole
from onehour.messages import say
from onehour.rules.schedule import parse_milestones
from onehour.training.build import complete
from onehour.training.checkpoint import latest_contents
from onehour.training.decisions import decisions_of
from onehour.training.record import RECIPE, Run, differences
from onehour.training.recorder import LINES, take_folder
from onehour.training.skipping import BAD_IMAGES
from onehour.training.state import digest_of
from onehour.training.store import Store, checkpoint_folders, digest_of_recipe

MAY_CHANGE = ("epochs", "base_lr", "decay", "decay_factor", "milestones", "warmup", "warmup_epochs", "continues")


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


BEHIND = " iteration "
"""What stands behind the run's folder in `Recipe.continues`."""


def begin_from(recipe: Recipe, execution: Execution) -> None:
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

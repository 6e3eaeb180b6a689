"""What is left of a run's folder that has lost its recipe.toml: whose it is, and how it goes on."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from onehour.config import Recipe
from onehour.training.store import checkpoint_folders, digest_of_recipe, read_manifest

__all__ = ["RECIPE", "name_rest", "refuse_rest"]

RECIPE = "recipe.toml"


def name_rest(folder: Path) -> str:
    """What a folder without recipe.toml is.

    >>> name_rest(Path("nowhere"))
    "nowhere is not a run's folder: it has no recipe.toml"
    """
    if left := checkpoint_folders(folder):
        return (
            f"{folder} is a run's folder that has lost its {RECIPE}, with checkpoints up to {left[-1].name}; put it"
            " back, or give the train command that began it: it goes on from there"
        )
    return f"{folder} is not a run's folder: it has no {RECIPE}"


def refuse_rest(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder without recipe.toml, unless it is empty, or what is left in it is of the very same recipe.

    Raises:
        ValueError: saying what it holds.

    >>> refuse_rest(Path("nowhere"), Recipe())
    """
    if not folder.exists() or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    others = 0
    for checkpoint in checkpoint_folders(folder):
        with suppress(ValueError):  # damaged, which is for who loads it to say
            if read_manifest(checkpoint).recipe == digest_of_recipe(recipe):
                return
            others += 1
    if others:
        raise ValueError(f"{folder} holds checkpoints of another recipe, and no {RECIPE}; choose another --out")
    with suppress(ValueError, OSError):  # no record, or a damaged one
        head = (folder / "metrics.jsonl").read_text(encoding="utf-8").partition("\n")[0]
        if json.loads(head) == json.loads(json.dumps({"recipe": recipe.as_dict()})):
            return
    raise ValueError(f"{folder} holds other files and no {RECIPE}; choose another --out")

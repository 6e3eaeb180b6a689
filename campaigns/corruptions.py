"""Thousands of seeded corruptions of a run's folder: a wrong state is never loaded, and a bad checkpoint is named.

    python -m campaigns.corruptions [--cases N]

A run's folder with four checkpoints is copied and damaged in one to four places: bits flipped, files cut, zeroed in
part, gone, swapped between checkpoints, whole checkpoints swapped, JSON edited. What is loaded must be, to the bit,
what was saved at its iteration, and the newest of those that were not touched, or a newer one that is the same; every
newer one must be named. Where none is left the start must be refused. A line of the ledger is a hundred of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch

from campaigns.ledger import run
from campaigns.writer import RECIPE, digest, expected, fill, fresh, progress_of
from onehour.dist.group import Group
from onehour.training.checkpoint import FILES, Checkpoints
from onehour.training.record import latest_contents
from onehour.training.state import Network

CAMPAIGN = "corruptions"
BLOCK = 100
ITERATIONS = (3, 5, 8, 12)
WIDTH = 8
Damage = Callable[[random.Random, Path], None]


def pristine(folder: Path) -> Path:
    """A run's folder with several checkpoints."""
    checkpoints = Checkpoints(folder, RECIPE, Group(), warn=print)
    checkpoints.store.kept = len(ITERATIONS)
    model, optimizer = fresh(WIDTH)
    for iteration in ITERATIONS:
        fill(model, optimizer, iteration)
        checkpoints.save(Network(model, optimizer), progress_of(iteration))
        checkpoints.wait()
    checkpoints.close()
    (folder / "recipe.toml").write_text(RECIPE.to_toml())
    return folder


def any_file(draw: random.Random, folder: Path) -> Path:
    """One of a checkpoint's files that is there and not empty."""
    return draw.choice(sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size))


def flip(draw: random.Random, folder: Path) -> None:
    """One to eight bits."""
    path = any_file(draw, folder)
    damaged = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    path.write_bytes(damaged)


def cut(draw: random.Random, folder: Path) -> None:
    """The end is gone."""
    path = any_file(draw, folder)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def grow(draw: random.Random, folder: Path) -> None:
    """Something follows."""
    path = any_file(draw, folder)
    path.write_bytes(path.read_bytes() + draw.choice((b"\0", b"\n", draw.randbytes(512))))


def hole(draw: random.Random, folder: Path) -> None:
    """Zeros, as of a block that never came to disk."""
    path = any_file(draw, folder)
    damaged = bytearray(path.read_bytes())
    size = draw.choice((16, 512, 4096, len(damaged)))
    start = draw.randrange(len(damaged)) // size * size
    damaged[start : start + size] = bytes(len(damaged[start : start + size]))
    path.write_bytes(damaged)


def drop(draw: random.Random, folder: Path) -> None:
    """A file is gone, or all of them."""
    if draw.random() < 0.2:
        shutil.rmtree(folder)
    else:
        any_file(draw, folder).unlink()


def swap(draw: random.Random, folder: Path) -> None:
    """A file of another checkpoint, here or there too."""
    other = draw.choice([path for path in sorted(folder.parent.iterdir()) if path != folder])
    name = any_file(draw, folder).name
    if (other / name).exists():
        mine, its = (folder / name).read_bytes(), (other / name).read_bytes()
        (folder / name).write_bytes(its)
        if draw.random() < 0.5:
            (other / name).write_bytes(mine)


def swap_files(draw: random.Random, folder: Path) -> None:
    """Two files of one checkpoint."""
    names = sorted(path.name for path in folder.iterdir())
    one, other = draw.choice(names), draw.choice(names)
    contents = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / other).write_bytes(contents[0])
    (folder / one).write_bytes(contents[1])


def rename(draw: random.Random, folder: Path) -> None:
    """A whole checkpoint under another's name, or under a new one."""
    target = draw.choice([*sorted(folder.parent.iterdir()), folder.with_name("iteration-000000099")])
    if target != folder:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder, target)


def edit(draw: random.Random, folder: Path) -> None:
    """A value of its JSON, at any depth."""
    path = folder / draw.choice(("manifest.json", "progress.json"))
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return
    place = content
    while isinstance(place, dict) and place:
        key = draw.choice(sorted(place))
        if not isinstance(place[key], dict) or draw.random() < 0.3:
            changes: list[Any] = [None, True, 1, -1, 12, 10**30, 1e300, "", "x", [], {}, {"bytes": 1, "sha256": ""}]
            place[key] = draw.choice(changes)
            break
        place = place[key]
    path.write_text(json.dumps(content, indent=draw.choice((None, 2))))


def edit_recipe(draw: random.Random, folder: Path) -> None:
    """The recipe is no longer the one whose checkpoints these are."""
    path = folder.parents[1] / "recipe.toml"
    path.write_text(path.read_text().replace("seed = 0", f"seed = {draw.randrange(1, 99)}"))


DAMAGES: list[Damage] = [flip, cut, grow, hole, drop, swap, swap_files, rename, edit, edit_recipe]


def fingerprint(folder: Path) -> str:
    """Of all bytes below a folder; empty where it is gone."""
    if not folder.is_dir():
        return ""
    return hashlib.sha256(
        repr([(path.name, path.read_bytes()) for path in sorted(folder.iterdir())]).encode()
    ).hexdigest()


def attempt(folder: Path, source: Path, case: int) -> tuple[str, str]:
    """Damage a copy and start from it: what happened, and what is wrong with that; empty if nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    draw = random.Random(f"{CAMPAIGN} {case}")
    before = {path.name: fingerprint(path) for path in (folder / "checkpoints").iterdir()}
    newest = folder / "checkpoints" / f"iteration-{ITERATIONS[-1]:09d}"
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = newest if draw.random() < 0.6 else draw.choice(sorted((folder / "checkpoints").iterdir()))
        damage = draw.choice(DAMAGES)
        if place.is_dir() and any(path.stat().st_size for path in place.iterdir()):
            damage(draw, place)
    there = {path.name: fingerprint(path) for path in (folder / "checkpoints").iterdir()}
    untouched = [number for number in ITERATIONS if there.get(name_of(number)) == before[name_of(number)]]
    other_recipe = (folder / "recipe.toml").read_text() != RECIPE.to_toml()
    return (evaluated if case % 4 == 0 or other_recipe else resumed)(folder, untouched, there, other_recipe)


def resumed(folder: Path, untouched: list[int], there: dict[str, str], other_recipe: bool) -> tuple[str, str]:
    """The start of a run."""
    said: list[str] = []
    model, optimizer = fresh(WIDTH)
    checkpoints = Checkpoints(folder, RECIPE, Group(), warn=said.append)
    try:
        progress = checkpoints.load(Network(model, optimizer))
    except ValueError as error:
        return "refused", f"refused, with {untouched} whole: {error}" if untouched else ""
    if progress is None:
        return "nothing there", f"started over, though there is {sorted(there)}" if there else ""
    iteration = progress["iteration"]
    right = progress == progress_of(iteration) and digest(model, optimizer) == expected(iteration, WIDTH)
    return judged(iteration, right, said, untouched, there)


def evaluated(folder: Path, untouched: list[int], there: dict[str, str], other_recipe: bool) -> tuple[str, str]:
    """As `onehour evaluate` and `export` read it; with another recipe beside them, no checkpoint is this run's."""
    try:
        with redirect_stderr(io.StringIO()) as errors:
            contents = latest_contents(folder)
    except ValueError as error:
        whole = untouched and not other_recipe
        return "refused", f"refused, with {untouched} whole: {error}" if whole else ""
    if contents is None:
        return "nothing there", f"found none, though there is {sorted(there)}" if there else ""
    iteration = json.loads(contents[-1])["iteration"]
    if other_recipe:
        return "loaded", f"iteration {iteration} was loaded as another recipe's"
    right = dict(zip(FILES, contents, strict=True)) == ORIGINALS[iteration]
    return judged(iteration, right, errors.getvalue().splitlines(), untouched, there)


def judged(
    iteration: int, right: bool, said: list[str], untouched: list[int], there: dict[str, str]
) -> tuple[str, str]:
    """Whether it is the right one, and newer ones are named."""
    if not right or iteration not in ITERATIONS:
        return "wrong", f"WRONG STATE of iteration {iteration}"
    if iteration < max(untouched, default=0):
        return "older", f"iteration {iteration} was loaded, with {untouched} whole"
    newer = [name for name in there if name > name_of(iteration)]
    unnamed = [name for name in newer if not any(f"{name}: " in text for text in said)]
    if unnamed or len(said) != len(newer) or not all(f"{name_of(iteration)} is used" in text for text in said):
        return "unnamed", f"{unnamed} was passed over, and said was {said}"
    return "fell back, and said so" if newer else "newest loaded", ""


def name_of(iteration: int) -> str:
    """Of a checkpoint's folder."""
    return f"iteration-{iteration:09d}"


ORIGINALS: dict[int, dict[str, bytes]] = {}
"""The bytes of each checkpoint's files, as they were written."""


def block(numbers: range, source: Path, folder: Path) -> dict[str, Any]:
    """Some cases, counted by what happened."""
    kinds: Counter[str] = Counter()
    failures = []
    for iteration in ITERATIONS:
        place = source / "checkpoints" / name_of(iteration)
        ORIGINALS[iteration] = {name: (place / name).read_bytes() for name in FILES}
    for case in numbers:
        try:
            kind, said = attempt(folder, source, case)
        except Exception as error:  # nothing but a ValueError may come out, and that is caught
            kind, said = "traceback", f"{type(error).__name__}: {error}"
        kinds[kind] += 1
        if said:
            failures.append(f"case {case}: {said}")
    about = {"runs": len(numbers), "failures": len(failures), "kinds": dict(kinds), "said": " | ".join(failures[:5])}
    return {"ok": not failures, **about}


def blocks() -> Iterator[tuple[str, int, Callable[[], dict[str, Any]]]]:
    """All ten thousand cases."""
    with tempfile.TemporaryDirectory() as name:
        source = pristine(Path(name) / "pristine")
        for case in range(10_000 // BLOCK):
            numbers = range(case * BLOCK, (case + 1) * BLOCK)
            yield CAMPAIGN, case, partial(block, numbers, source, Path(name) / "damaged")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(CAMPAIGN, blocks()))

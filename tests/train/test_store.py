"""Whatever happens to the files, a wrong state is never loaded, and the last good one is never dropped."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onehour.train.store import Store, Stored
from onehour.train.tensorfile import write_bytes

Damage = Callable[[random.Random, Path], None]


def content(iteration: int, name: str) -> bytes:
    return f"{name} of {iteration} ".encode() * 40


def store(folder: Path, kept: int = 2) -> Store:
    return Store(folder, recipe="mine", kept=kept)


def fill(folder: Path, iterations: range, *, infinite: tuple[int, ...] = (), kept: int = 2) -> Store:
    made = store(folder, kept)
    for iteration in iterations:

        def write(path: Path, iteration: int = iteration) -> dict:
            return write_bytes(path, content(iteration, path.name)) | {"finite": iteration not in infinite}

        made.write(iteration, {"model": write, "progress": write})
    return made


def names(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").iterdir())


def right(stored: Stored | None) -> bool:
    return stored is not None and stored.contents == {
        name: content(stored.iteration, name) for name in ("model", "progress")
    }


def test_the_newest_is_computed_from_the_numbers(tmp_path: Path):
    fill(tmp_path, range(8, 12), kept=9)
    fill(tmp_path, range(1_234_567_890, 1_234_567_891), kept=9)
    stored = store(tmp_path, kept=9).newest()
    assert stored is not None
    assert (stored.iteration, right(stored)) == (1_234_567_890, True)


def test_the_last_two_stay(tmp_path: Path):
    fill(tmp_path, range(1, 6))
    assert names(tmp_path) == [4, 5]


def test_damaged_ones_do_not_count_among_those_that_stay(tmp_path: Path):
    fill(tmp_path, range(1, 3))
    (tmp_path / "checkpoints" / "iteration-000000002" / "model").write_bytes(b"")
    fill(tmp_path, range(3, 4))  # another process, which knows nothing of the first
    assert names(tmp_path) == [1, 2, 3]


def test_the_last_finite_one_stays(tmp_path: Path):
    fill(tmp_path, range(1, 8), infinite=(3, 4, 5, 6, 7))
    assert names(tmp_path) == [2, 6, 7]


def test_leftovers_are_cleared(tmp_path: Path):
    made = fill(tmp_path, range(1, 2))
    (tmp_path / "checkpoints" / ".writing-iteration-000000002").mkdir()
    made.clear_leftovers()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000000001"]


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    made = fill(tmp_path, range(1, 2))

    def fails(path: Path) -> dict:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        made.write(2, {"model": fails})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000000001"]
    assert right(made.newest())


def flip(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(folder.iterdir()))
    damaged = bytearray(path.read_bytes())
    damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    path.write_bytes(damaged)


def cut(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def hole(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(folder.iterdir()))
    damaged = bytearray(path.read_bytes())
    start = draw.randrange(len(damaged))
    damaged[start : start + 64] = bytes(len(damaged[start : start + 64]))
    path.write_bytes(damaged)


def drop(draw: random.Random, folder: Path) -> None:
    draw.choice(sorted(folder.iterdir())).unlink()


def swap(draw: random.Random, folder: Path) -> None:
    name = draw.choice(sorted(path.name for path in folder.iterdir()))
    shutil.copyfile(folder.parent / "iteration-000000001" / name, folder / name)


def swap_all(draw: random.Random, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "iteration-000000001", folder)


def edit(draw: random.Random, folder: Path) -> None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):  # damaged already
        return
    key = draw.choice(sorted(manifest))
    manifest[key] = draw.choice([None, 1, "", [], {}, {"model": {"bytes": 1}}, True])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), damages=st.lists(st.sampled_from([flip, cut, hole, drop, swap, swap_all, edit])))
def test_no_damage_loads_a_wrong_state(tmp_path_factory: pytest.TempPathFactory, seed: int, damages: list[Damage]):
    folder = tmp_path_factory.mktemp("store")
    fill(folder, range(1, 3))
    draw, newer = random.Random(seed), folder / "checkpoints" / "iteration-000000002"
    for damage in damages:
        if newer.exists() and any(newer.iterdir()) and all(path.stat().st_size for path in newer.iterdir()):
            damage(draw, newer)
    made = store(folder)
    assert right(made.newest())
    shutil.rmtree(folder)


def test_hostile_manifests_are_refused_with_a_reason(tmp_path: Path):
    made = fill(tmp_path, range(1, 2))
    folder = tmp_path / "checkpoints" / "iteration-000000001"
    for text in ("[" * 100_000, "{}", "[]", "null", '{"sha256": 1}', "x" * 2**21, '{"files": {"../../x": {}}}'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="can be trusted"):
            made.newest()

"""Whatever happens to the files, a wrong state is never loaded, and the last good one is never dropped."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onehour.files import sync_folder
from onehour.training.store import Store, Stored
from onehour.training.tensorfile import write_bytes

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


def test_one_that_changed_since_it_was_verified_does_not_count(tmp_path: Path):
    made = fill(tmp_path, range(1, 3))
    (newest(tmp_path) / "model").write_bytes(content(2, "modem"))
    made.write(3, {"model": lambda path: write_bytes(path, b"3")})
    assert names(tmp_path) == [1, 2, 3]
    made.write(4, {"model": lambda path: write_bytes(path, b"4")})
    assert names(tmp_path) == [3, 4]


def test_the_last_finite_one_stays_even_if_it_cannot_be_read_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fill(tmp_path, range(1, 2))
    made, verified = store(tmp_path), Store.verified

    def refuses(self: Store, folder: Path) -> Stored:
        if folder.name.endswith("1"):
            raise ValueError("model cannot be read: Input/output error")
        return verified(self, folder)

    monkeypatch.setattr(Store, "verified", refuses)
    for iteration in range(2, 6):
        made.write(iteration, {"model": lambda path: write_bytes(path, b"x") | {"finite": False}})
    assert names(tmp_path) == [1, 4, 5]
    monkeypatch.undo()
    assert store(tmp_path).verified(tmp_path / "checkpoints" / "iteration-000000001").finite


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(["finite", "infinite", "damaged"]), min_size=1, max_size=9), kept=st.integers(1, 3)
)
def test_what_stays_are_the_last_verified_ones_and_the_last_finite_one(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], kept: int
):
    folder = tmp_path_factory.mktemp("thin")
    infinite = tuple(place for place, kind in enumerate(kinds, 1) if kind == "infinite")
    fill(folder, range(1, len(kinds) + 1), infinite=infinite, kept=len(kinds))
    for place, kind in enumerate(kinds, 1):
        if kind == "damaged":
            (folder / "checkpoints" / f"iteration-{place:09d}" / "model").write_bytes(b"")
    store(folder, kept).thin()
    good = [place for place, kind in enumerate(kinds, 1) if kind != "damaged"]
    finite = [place for place, kind in enumerate(kinds, 1) if kind == "finite"]
    assert set(good[-kept:]) | set(finite[-1:]) <= set(names(folder))
    assert not (set(good) - set(good[-kept:]) - set(finite[-1:])) & set(names(folder))
    shutil.rmtree(folder)


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir())


@pytest.mark.parametrize("start", [True, False])
def test_leftovers_are_cleared_by_the_next_start_and_the_next_write(tmp_path: Path, start: bool):
    made = fill(tmp_path, range(1, 2))
    for name in (".writing-iteration-000000002", ".dropping-iteration-000000000"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "model").write_bytes(b"half")
    if start:
        made.clear_leftovers()
    else:
        fill(tmp_path, range(1, 2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000000001"]


@pytest.mark.parametrize("replaced", [True, False])
def test_one_that_was_about_to_be_replaced_gets_its_name_back(tmp_path: Path, replaced: bool):
    made = fill(tmp_path, range(1, 3))
    aside = newest(tmp_path).rename(newest(tmp_path).with_name(".replaced-iteration-000000002"))
    if replaced:
        shutil.copytree(aside, aside.with_name("iteration-000000002"))
    made.clear_leftovers()
    stored = store(tmp_path).newest()
    assert right(stored)
    assert names(tmp_path) == [1, 2]


def test_what_is_half_deleted_has_no_checkpoints_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = fill(tmp_path, range(1, 3))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it did anything
    made.write(3, {"model": lambda path: write_bytes(path, b"x")})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        ".dropping-iteration-000000001",
        "iteration-000000002",
        "iteration-000000003",
    ]


def test_the_same_iteration_is_replaced(tmp_path: Path):
    made = fill(tmp_path, range(1, 3))
    (newest(tmp_path) / "model").write_bytes(b"")
    fill(tmp_path, range(2, 3))
    assert names(tmp_path) == [1, 2]
    assert right(made.newest())
    assert made.problems == []


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


def test_what_was_passed_over_is_kept_without_its_name_until_its_iteration_is_saved_again(tmp_path: Path):
    fill(tmp_path, range(8, 11), kept=9)
    place = tmp_path / "checkpoints"
    for iteration in (9, 10):
        (place / f"iteration-{iteration:09d}" / "model").write_bytes(b"")
    made = store(tmp_path)
    assert right(made.newest())
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == []  # who only reads renames nothing
    made.set_aside()
    assert sorted(path.name for path in place.iterdir()) == [
        ".damaged-iteration-000000009",
        ".damaged-iteration-000000010",
        "iteration-000000008",
    ]
    made.clear_leftovers()
    fill(tmp_path, range(9, 10))
    assert names(tmp_path) == [8, 9, 10]
    fill(tmp_path, range(1_234_567_890, 1_234_567_891))
    assert names(tmp_path) == [9, 1_234_567_890]


def test_checkpoints_that_are_a_link_are_none_of_the_runs(tmp_path: Path):
    fill(tmp_path / "other", range(1, 3))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "other" / "checkpoints")
    with pytest.raises(ValueError, match="is a link"):
        store(tmp_path / "run").newest()
    assert names(tmp_path / "other") == [1, 2]


def test_links_among_the_checkpoints_are_removed_and_not_followed(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    made = fill(tmp_path / "run", range(2, 4))
    place = tmp_path / "run" / "checkpoints"
    for name in (".writing-iteration-000000004", ".dropping-x", "iteration-000000001"):
        (place / name).symlink_to(tmp_path / "precious")
    made.write(4, {"model": lambda path: write_bytes(path, b"x")})
    assert names(tmp_path / "run") == [3, 4]
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_listed_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = fill(tmp_path, range(1, 2))

    def refuses(_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "iterdir", refuses)
    with pytest.raises(ValueError, match="checkpoints cannot be listed: Input/output error"):
        made.newest()


def test_a_folders_entries_are_synced(tmp_path: Path):
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("recipe", "needs", "said"),
    [
        ("other", (), "it belongs to a run of another recipe"),
        ("mine", ("model", "optimizer", "weights"), "its manifest has no optimizer, weights"),
    ],
)
def test_what_is_none_of_this_runs_is_refused(tmp_path: Path, recipe: str, needs: tuple[str, ...], said: str):
    fill(tmp_path, range(1, 2))
    with pytest.raises(ValueError, match=f"can be trusted .iteration-000000001: {said}"):
        Store(tmp_path, recipe=recipe, needs=needs).newest()

"""Whatever happens to the files, a wrong state is never loaded, and the last good one is never dropped."""

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from onehour.files import sync_folder
from onehour.training.store import MANIFEST, TYPES, Store, Stored, read_manifest, write_file

Damage = Callable[[random.Random, Path], None]


def content(iteration: int, name: str) -> bytes:
    return f"{name} of {iteration} ".encode() * 40


def store(folder: Path, kept: int = 2) -> Store:
    return Store(folder, recipe="mine", kept=kept)


def fill(folder: Path, iterations: range, *, infinite: tuple[int, ...] = (), kept: int = 2) -> Store:
    made = store(folder, kept)
    for iteration in iterations:
        files = {name: content(iteration, name) for name in ("model", "progress")}
        made.write(iteration, files | {"numbers": {"a": torch.tensor(math.inf if iteration in infinite else 1.0)}})
    return made


def names(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").iterdir())


def right(stored: Stored | None) -> bool:
    return stored is not None and all(
        stored.contents[name] == content(stored.iteration, name) for name in ("model", "progress")
    )


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
    made.write(3, {"model": b"3"})
    assert names(tmp_path) == [1, 2, 3]
    made.write(4, {"model": b"4"})
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
        made.write(iteration, {"model": {"a": torch.tensor(math.nan)}})
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
    made.write(3, {"model": b"x"})
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


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = fill(tmp_path, range(1, 2))

    def fails(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        made.write(2, {"model": b"half"})
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
    made.write(4, {"model": b"x"})
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a file "model"."""
    return store(tmp_path).write(1, {"model": b"state"})


def forged(folder: Path, **changes: object) -> None:
    """A manifest with changes and the digest that it must have."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}))


def test_what_was_written_is_read(tmp_path: Path):
    folder = Store(tmp_path, recipe="mine").write(7, {"model": b"abc", "numbers": {"a": torch.tensor(math.nan)}})
    found = read_manifest(folder)
    assert (found.iteration, found.recipe, found.finite, found.contents) == (7, "mine", False, {})
    assert found.files["model"] == (3, hashlib.sha256(b"abc").hexdigest())


HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "is damaged"),
        ("{}", "differs from its digest"),
        ("[]", "differs from its digest"),
        ("null", "differs from its digest"),
        ('{"sha256": 1}', "differs from its digest"),
        ("x" * 2**21, "too large"),
        (f'{{"iteration": {HUGE}}}', "is damaged"),
        ("[1][1]", "is damaged"),
        ("\0", "is damaged"),
        ('{"sha256": "\\ud800"}', "differs from its digest"),
    ],
)
def test_what_is_no_manifest_is_refused_with_a_reason(folder: Path, text: str, said: str):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=said) as raised:
        read_manifest(folder)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("depth", [500, 900, 990, 1000, 1100, 5000])
def test_nesting_of_any_depth_is_refused(folder: Path, depth: int):
    (folder / MANIFEST).write_text('{"sha256": "", "files": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(ValueError, match=r"manifest\.json (is damaged|differs)"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": {"../outside": {"bytes": 1, "sha256": ""}}}, r"names a file outside it, '\.\./outside'"),
        ({"files": {"..": {"bytes": 1, "sha256": ""}}}, "names a file outside it"),
        ({"files": {"/etc/hostname": {"bytes": 1, "sha256": ""}}}, "names a file outside it"),
        ({"files": {"model": {"bytes": float("inf"), "sha256": ""}}}, "was not written by onehour"),
        ({"files": {"model": {"bytes": True, "sha256": ""}}}, "was not written by onehour"),
        ({"files": {"model": None}}, "was not written by onehour"),
        ({"files": []}, "was not written by onehour"),
        ({"iteration": 1.0}, "was not written by onehour"),
        ({"finite": 1}, "was not written by onehour"),
        ({"recipe": None}, "was not written by onehour"),
        ({"format": "\x1b[2J"}, r"its format is '\\x1b\[2J', this version reads 1"),
    ],
)
def test_forged_manifests_are_refused_with_a_reason(folder: Path, changes: dict[str, object], said: str):
    forged(folder, **changes)
    with pytest.raises(ValueError, match=said):
        read_manifest(folder)


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/hostname", path)])
@pytest.mark.parametrize("name", ["model", MANIFEST])
def test_pipes_links_and_folders_are_no_plain_files(folder: Path, name: str, put: Callable[[Path], None]):
    (folder / name).unlink()
    put(folder / name)
    with pytest.raises(ValueError, match=f"{name} (is not a plain file|cannot be read)"):
        store(folder.parents[1]).verified(folder)


def test_a_file_of_another_size_is_not_read(folder: Path):
    (folder / "model").write_bytes(b"other state")
    with pytest.raises(ValueError, match="model has 11 bytes instead of 5"):
        store(folder.parents[1]).verified(folder)


def test_a_file_that_does_not_fit_into_memory_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def too_large(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("onehour.training.store.open", too_large, raising=False)
    with pytest.raises(ValueError, match=r"manifest\.json does not fit into memory"):
        store(folder.parents[1]).verified(folder)


@pytest.mark.parametrize("dtype", list(TYPES))
def test_every_type_is_read_back_as_it_was(dtype: torch.dtype, tmp_path: Path):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    write_file(tmp_path / "a", {"a/ä": tensor})
    read = load_file(tmp_path / "a")["a/ä"]
    assert read.dtype == dtype
    assert torch.equal(read, tensor)


def test_shapes_sizes_and_mixed_types_are_kept(tmp_path: Path):
    state = {
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "weight": torch.randn(5, 3, 1),
        "half": torch.randn(3).bfloat16(),
    }
    said = write_file(tmp_path / "a", state)
    read = load_file(tmp_path / "a")
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)
    content = (tmp_path / "a").read_bytes()
    assert said == ({"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, True)


def test_no_tensors_are_a_file_too(tmp_path: Path):
    write_file(tmp_path / "a", {})
    assert load_file(tmp_path / "a") == {}


def test_bytes_have_their_digest(tmp_path: Path):
    assert write_file(tmp_path / "a", b"abc")[0]["sha256"] == hashlib.sha256(b"abc").hexdigest()
    assert (tmp_path / "a").read_bytes() == b"abc"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_not_finite_is_said(value: float, dtype: torch.dtype, tmp_path: Path):
    """Wherever it is, and however large the others are."""
    tensor = torch.full((2**20 + 3,), torch.finfo(dtype).max, dtype=dtype)
    state = {"a": torch.zeros(2), "b": tensor, "c": torch.tensor(True)}
    for place in (0, 2**19 + 5, -1):
        assert write_file(tmp_path / f"finite {place}", state)[1] is True
        tensor[place] = value
        assert write_file(tmp_path / f"{place}", state)[1] is False
        tensor[place] = -torch.finfo(dtype).max


def test_a_large_tensor_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However little the system takes at once."""
    real = os.write

    def some(descriptor: int, part: memoryview) -> int:
        return real(descriptor, part[: max(1, len(part) // 2)])

    tensor = torch.arange(3_000_001, dtype=torch.float32)
    monkeypatch.setattr(os, "write", some)
    about, _ = write_file(tmp_path / "a", {"a": tensor})
    assert torch.equal(load_file(tmp_path / "a")["a"], tensor)
    assert about["sha256"] == hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()


def test_a_file_is_new_and_no_link_leads_it_elsewhere(tmp_path: Path):
    (tmp_path / "there").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link"):
        with pytest.raises(FileExistsError):
            write_file(tmp_path / name, b"abc")
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "elsewhere").exists()


def test_a_type_that_the_format_has_not_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"wave is torch\.complex64"):
        write_file(tmp_path / "a", {"wave": torch.zeros(2, dtype=torch.complex64)})

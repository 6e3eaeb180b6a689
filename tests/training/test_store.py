"""Whatever happens to the files, a wrong state is never loaded, and the last good one is never dropped."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from onehour.training.checkpoint import FILES, MANIFEST, Store, Stored, read_manifest
from onehour.training.state import TYPES, as_safetensors

MODEL, OPTIMIZER, PROGRESS = FILES


def contents(iteration: int, value: float = 1.0) -> list[Any]:
    progress = {"iteration": iteration, "position": 8, "totals": [0.5, 2.0], "build": {"torch": "2"}}
    return [{"a": torch.tensor([float(iteration), value])}, b"velocity" * 40, json.dumps(progress).encode()]


def store(folder: Path, kept: int = 2) -> Store:
    made = Store(folder, recipe="mine")
    made.kept = kept
    return made


def fill(folder: Path, iterations: Iterable[int], *, infinite: tuple[int, ...] = (), kept: int = 2) -> Store:
    made = store(folder, kept)
    for iteration in iterations:
        made.write(iteration, contents(iteration, math.inf if iteration in infinite else 1.0))
    return made


def at(folder: Path, iteration: int) -> Path:
    return folder / "checkpoints" / f"iteration-{iteration:09d}"


def names(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in (folder / "checkpoints").iterdir())


def found(folder: Path, *, resumes: bool = False) -> tuple[int, list[str]]:
    """The iteration of the newest one, which is what was written, and what is said of newer ones."""
    said: list[str] = []
    stored = store(folder).newest(said.append, resumes=resumes)
    assert stored is not None
    model, *others = contents(stored.iteration)
    assert stored.contents == [b"".join(as_safetensors(model)), *others]
    return stored.iteration, said


def test_the_newest_is_computed_from_the_numbers(tmp_path: Path):
    fill(tmp_path, [8, 9, 10, 1_234_567_890], kept=9)
    assert found(tmp_path) == (1_234_567_890, [])


def test_where_there_is_none_none_is_found(tmp_path: Path):
    assert store(tmp_path / "nowhere").newest(print) is None


def test_one_that_changed_since_it_was_written_does_not_count(tmp_path: Path):
    made = fill(tmp_path, range(1, 3))
    (at(tmp_path, 2) / OPTIMIZER).write_bytes(b"elocityv" * 40)
    made.write(3, contents(3))
    assert names(tmp_path) == [1, 2, 3]
    made.write(4, contents(4))
    assert names(tmp_path) == [3, 4]


def test_what_a_process_has_written_it_does_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path, [1])
    read: list[str] = []
    verified = Store.verified

    def noted(self: Store, folder: Path) -> Stored:
        read.append(folder.name[-1])
        return verified(self, folder)

    monkeypatch.setattr(Store, "verified", noted)
    fill(tmp_path, range(2, 6))
    assert read == ["1"]
    assert names(tmp_path) == [4, 5]


def test_the_last_finite_one_stays_even_if_it_cannot_be_read_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fill(tmp_path, [1])
    verified = Store.verified

    def refuses(self: Store, folder: Path) -> Stored:
        if folder.name.endswith("1"):
            raise ValueError("model cannot be read: Input/output error")
        return verified(self, folder)

    monkeypatch.setattr(Store, "verified", refuses)
    fill(tmp_path, range(2, 6), infinite=(2, 3, 4, 5))
    assert names(tmp_path) == [1, 4, 5]
    monkeypatch.undo()
    assert store(tmp_path).verified(at(tmp_path, 1)).finite


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
            (at(folder, place) / MODEL).write_bytes(b"")
    store(folder, kept).thin()
    good = [place for place, kind in enumerate(kinds, 1) if kind != "damaged"]
    finite = [place for place, kind in enumerate(kinds, 1) if kind == "finite"]
    stay = set(good[-kept:]) | set(finite[-1:])
    assert set(good) & set(names(folder)) == stay
    shutil.rmtree(folder)


@pytest.mark.parametrize("start", [True, False])
def test_leftovers_are_cleared_by_the_next_start_and_the_next_write(tmp_path: Path, start: bool):
    made = fill(tmp_path, [1])
    for name in (".writing-iteration-000000002", ".dropping-iteration-000000000"):
        shutil.copytree(at(tmp_path, 1), tmp_path / "checkpoints" / name)
    if start:
        made.newest(print, resumes=True)
    else:
        fill(tmp_path, [1])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000000001"]


@pytest.mark.parametrize("replaced", [True, False])
def test_one_that_was_about_to_be_replaced_gets_its_name_back(tmp_path: Path, replaced: bool):
    fill(tmp_path, range(1, 3))
    aside = at(tmp_path, 2).rename(at(tmp_path, 2).with_name(".replaced-iteration-000000002"))
    if replaced:
        shutil.copytree(aside, at(tmp_path, 2))
    assert found(tmp_path, resumes=True) == (2, [])
    assert names(tmp_path) == [1, 2]


def test_what_is_half_deleted_has_no_checkpoints_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = fill(tmp_path, range(1, 3))
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it did anything
    made.write(3, contents(3))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        ".dropping-iteration-000000001",
        "iteration-000000002",
        "iteration-000000003",
    ]


def test_the_same_iteration_is_replaced(tmp_path: Path):
    fill(tmp_path, range(1, 3))
    (at(tmp_path, 2) / MODEL).write_bytes(b"")
    fill(tmp_path, [2])
    assert names(tmp_path) == [1, 2]
    assert found(tmp_path) == (2, [])


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = fill(tmp_path, [1])

    def fails(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left"):
        made.write(2, contents(2))
    assert names(tmp_path) == [1]
    assert found(tmp_path) == (1, [])


def test_what_was_left_out_is_kept_without_its_name_until_its_iteration_is_saved_again(tmp_path: Path):
    fill(tmp_path, range(8, 11), kept=9)
    for iteration in (9, 10):
        (at(tmp_path, iteration) / MODEL).write_bytes(b"")
    said = [
        f"a damaged checkpoint was left out: iteration-{iteration:09d}: {MODEL} has 0 bytes instead of 80;"
        " iteration-000000008 is used in its place"
        for iteration in (10, 9)
    ]
    assert found(tmp_path) == (8, said)
    assert names(tmp_path) == [8, 9, 10]  # who only reads renames nothing
    assert found(tmp_path, resumes=True) == (8, said)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        ".damaged-iteration-000000009",
        ".damaged-iteration-000000010",
        "iteration-000000008",
    ]
    (tmp_path / "checkpoints" / ".damaged-mine").mkdir()
    assert found(tmp_path, resumes=True) == (8, [])
    fill(tmp_path, [9])
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob(".*")) == [
        ".damaged-iteration-000000010",
        ".damaged-mine",
    ]
    fill(tmp_path, [1_234_567_890])
    assert [path.name for path in (tmp_path / "checkpoints").glob(".*")] == [".damaged-mine"]


def test_checkpoints_that_are_a_link_are_none_of_the_runs(tmp_path: Path):
    fill(tmp_path / "other", range(1, 3))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "other" / "checkpoints")
    with pytest.raises(ValueError, match="is a link"):
        store(tmp_path / "run").newest(print)
    assert names(tmp_path / "other") == [1, 2]


def test_links_among_the_checkpoints_are_removed_and_not_followed(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("mine")
    made = fill(tmp_path / "run", range(2, 4))
    for name in (".writing-iteration-000000004", ".dropping-x", "iteration-000000001"):
        (tmp_path / "run" / "checkpoints" / name).symlink_to(tmp_path / "precious")
    made.write(4, contents(4))
    assert names(tmp_path / "run") == [3, 4]
    assert (tmp_path / "precious" / "file").read_text() == "mine"


def refusal(folder: Path) -> str:
    """Why a checkpoint is not trusted, in one line."""
    with pytest.raises(ValueError, match=r".") as refused:
        store(folder.parents[1]).verified(folder)
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


def test_a_run_of_another_recipe_has_none_of_these(tmp_path: Path):
    fill(tmp_path, [1])
    with pytest.raises(
        ValueError, match=r"can be trusted .iteration-000000001: it belongs to a run of another recipe.; start over"
    ):
        Store(tmp_path, recipe="other").newest(print)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint."""
    return store(tmp_path).write(1, contents(1))


def forge(folder: Path, **changes: object) -> None:
    """A manifest with changes and the digest that it must have."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}))


def test_a_manifest_says_what_was_written(tmp_path: Path):
    folder = store(tmp_path).write(7, [{"a": torch.tensor(math.nan)}, b"abc", contents(7)[2]])
    manifest = read_manifest(folder)
    assert (manifest["iteration"], manifest["recipe"], manifest["finite"]) == (7, "mine", False)
    for name in FILES:
        content = (folder / name).read_bytes()
        about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert manifest["files"][name] == about


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("{}", "it has no 'format'"),
        ("[]", "expected an object"),
        ("null", "expected an object"),
        ('{"sha256": 1}', "sha256 is 1; expected text"),
        ("x" * 2**21, "Expecting value"),
        (f'{{"iteration": {"9" * 5000}}}', "integer"),
        ("[1][1]", "Extra data"),
        ("\0", "Expecting value"),
    ],
)
def test_what_is_no_manifest_is_refused_with_a_reason(folder: Path, text: str, said: str):
    (folder / MANIFEST).write_text(text)
    refused = refusal(folder)
    assert refused.startswith("manifest.json is damaged: ")
    assert said in refused


@pytest.mark.parametrize("depth", [500, 900, 990, 1000, 1100, 5000])
def test_nesting_of_any_depth_is_refused(folder: Path, depth: int):
    text = (folder / MANIFEST).read_text()
    for place in ('"files": ', '"more": '):
        (folder / MANIFEST).write_text("{" + place + "[" * depth + "]" * depth + "," + text[1:].replace("files", "f"))
        assert "manifest.json is damaged" in refusal(folder)


def about(**changes: object) -> dict[str, object]:
    return {name: {"bytes": 1, "sha256": ""} for name in FILES} | changes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"files": about() | {"../outside": {"bytes": 1, "sha256": ""}}}, "expected bytes and sha256 of model.safet"),
        ({"files": {MODEL: {"bytes": 1, "sha256": ""}}}, "expected bytes and sha256 of model.safetensors, optimizer.s"),
        ({"files": about() | {MODEL: {"bytes": 1}}}, "expected bytes and sha256 of"),
        ({"files": about() | {MODEL: None}}, "expected bytes and sha256 of"),
        ({"files": []}, "files is []; expected bytes and sha256 of"),
        ({"files": about() | {MODEL: {"bytes": math.inf, "sha256": ""}}}, "has 80 bytes instead of inf"),
        ({"iteration": 1.0}, "iteration is 1.0; expected a whole number"),
        ({"iteration": 2}, "its manifest is that of iteration 2"),
        ({"finite": 1}, "finite is 1; expected true or false"),
        ({"recipe": None}, "recipe is None; expected text"),
        ({"format": "\x1b[2J"}, r"format is '\x1b[2J'; expected 1, which this version reads"),
    ],
)
def test_forged_manifests_are_refused_with_a_reason(folder: Path, changes: dict[str, object], said: str):
    forge(folder, **changes)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"iteration": 2}, "iteration is 2; expected 1"),
        ({"iteration": "1"}, "expected 1"),
        ({"totals": [1.0]}, "expected two numbers"),
        ({"totals": None}, "expected two numbers"),
        ({"position": 10**30}, "expected a whole number"),
        ({"position": -1}, "position is -1; expected a whole number"),
        ({"skipped": "many"}, "expected a whole number"),
        ({"evaluated": 0}, "expected true or false"),
        ({"build": {"torch": "\x1b[2J"}}, "expected texts by name"),
        ({"build": []}, "expected texts by name"),
    ],
)
def test_progress_that_no_run_wrote_is_refused(tmp_path: Path, change: dict[str, Any], said: str):
    """Its digest is right: somebody forged it."""
    model, optimizer, progress = contents(1)
    folder = store(tmp_path).write(1, [model, optimizer, json.dumps(json.loads(progress) | change).encode()])
    assert said in refusal(folder)


@pytest.mark.parametrize(
    "put", [os.mkfifo, os.mkdir, lambda path: os.symlink("/etc/hostname", path), lambda path: None]
)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_pipes_links_folders_and_nothing_are_no_regular_files(folder: Path, name: str, put: Callable[[Path], None]):
    (folder / name).unlink()
    put(folder / name)
    assert refusal(folder).startswith((f"{name} is not a regular file", f"{name} cannot be read: "))


@pytest.mark.parametrize("content", [b"other state", b"elocityv" * 40])
def test_a_file_of_another_size_or_content_is_named(folder: Path, content: bytes):
    (folder / OPTIMIZER).write_bytes(content)
    said = "has 11 bytes instead of 320" if len(content) == 11 else "differs from its digest"
    assert refusal(folder) == f"{OPTIMIZER} {said}"


def test_a_file_that_does_not_fit_into_memory_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def too_large(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("onehour.training.checkpoint.open", too_large, raising=False)
    assert refusal(folder) == "manifest.json does not fit into memory"


def test_shapes_sizes_and_every_type_are_read_back_as_they_were():
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in TYPES} | {
        "a/ä": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "weight": torch.randn(5, 3, 1),
    }
    read = load(b"".join(as_safetensors(state)))
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert (read[name].shape, read[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(read[name], tensor)
    assert load(b"".join(as_safetensors({}))) == {}


def test_the_bytes_of_a_file_of_tensors_are_those_that_they_always_were():
    state = {"b": torch.tensor([1, 2], dtype=torch.uint8), "a": torch.tensor([0.5])}
    header = '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "U8", "shape": [2],'
    header = f'{header} "data_offsets": [4, 6]}}}}'.ljust(128)
    assert b"".join(as_safetensors(state)) == b"\x80" + bytes(7) + header.encode() + b"\0\0\0?\1\2"


def test_a_type_that_the_format_has_not_is_named():
    with pytest.raises(ValueError, match=r"wave is torch\.complex64"):
        list(as_safetensors({"wave": torch.zeros(2, dtype=torch.complex64)}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_not_finite_is_said(value: float, dtype: torch.dtype, tmp_path: Path):
    """Wherever it is, and however large the others are."""
    tensor = torch.full((2**12 + 3,), torch.finfo(dtype).max, dtype=dtype)
    state = {"a": torch.zeros(2), "b": tensor, "c": torch.tensor(True), "empty": torch.zeros(0)}
    made = store(tmp_path)
    for iteration, place in enumerate((0, 2**11 + 5, -1)):
        for number, finite in ((-torch.finfo(dtype).max, True), (value, False)):
            tensor[place] = number
            folder = made.write(iteration, [b"", state, contents(iteration)[2]])
            assert read_manifest(folder)["finite"] is finite
        tensor[place] = 0


def test_a_large_tensor_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """However little the system takes at once."""
    real = os.write

    def some(descriptor: int, part: memoryview) -> int:
        return real(descriptor, part[: max(1, len(part) // 2)])

    tensor = torch.arange(3_000_001, dtype=torch.float32)
    monkeypatch.setattr(os, "write", some)
    folder = store(tmp_path).write(1, [{"a": tensor}, *contents(1)[1:]])
    assert torch.equal(load(store(tmp_path).verified(folder).contents[0])["a"], tensor)

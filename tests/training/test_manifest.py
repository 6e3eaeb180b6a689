"""A manifest is believed only if it is sound, and files are read only if they are plain."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from onehour.training.manifest import MANIFEST, read_manifest, read_plain, write_manifest
from onehour.training.store import Store
from onehour.training.tensorfile import write_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with a file "model"."""
    store = Store(tmp_path, recipe="mine")
    return store.write(1, {"model": lambda path: write_bytes(path, b"state")})


def forged(folder: Path, **changes: object) -> None:
    """A manifest with changes and the digest that it must have."""
    manifest = json.loads((folder / MANIFEST).read_text()) | changes
    del manifest["sha256"]
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest | {"sha256": digest}))


def test_what_was_written_is_read(tmp_path: Path):
    files = {"model": {"bytes": 3, "sha256": "ab"}}
    write_manifest(tmp_path, iteration=7, recipe="mine", finite=False, files=files)
    found = read_manifest(tmp_path)
    assert (found.iteration, found.recipe, found.finite, found.files) == (7, "mine", False, {"model": (3, "ab")})


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
        ({"files": {"model": {"bytes": float("inf"), "sha256": ""}}}, "none of ours"),
        ({"files": {"model": {"bytes": True, "sha256": ""}}}, "none of ours"),
        ({"files": {"model": None}}, "none of ours"),
        ({"files": []}, "none of ours"),
        ({"iteration": 1.0}, "none of ours"),
        ({"finite": 1}, "none of ours"),
        ({"recipe": None}, "none of ours"),
        ({"format": "\x1b[2J"}, r"its format is '\\x1b\[2J', this version reads 1"),
    ],
)
def test_forged_manifests_are_refused_with_a_reason(folder: Path, changes: dict[str, object], said: str):
    forged(folder, **changes)
    with pytest.raises(ValueError, match=said):
        read_manifest(folder)


def test_pipes_links_and_folders_are_no_plain_files(tmp_path: Path):
    path = tmp_path / "model"
    (tmp_path / "elsewhere").write_bytes(b"state")
    for put in (os.mkfifo, os.mkdir, lambda path: os.symlink(tmp_path / "elsewhere", path)):
        put(path)
        with pytest.raises(ValueError, match=r"model (is no plain file|cannot be read)"):
            read_plain(path, 5)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_file_of_another_size_is_not_read(tmp_path: Path):
    (tmp_path / "model").write_bytes(b"state")
    assert read_plain(tmp_path / "model", 5) == b"state"
    with pytest.raises(ValueError, match="model has 5 bytes instead of 6"):
        read_plain(tmp_path / "model", 6)


def test_a_file_that_does_not_fit_into_memory_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def too_large(*_: object, **__: object) -> None:
        raise MemoryError

    (tmp_path / "model").write_bytes(b"state")
    monkeypatch.setattr("onehour.training.manifest.open", too_large, raising=False)
    with pytest.raises(ValueError, match="model does not fit into memory"):
        read_plain(tmp_path / "model", 5)

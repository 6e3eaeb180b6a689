"""Whole files, appends and folders: all of it or nothing, and no link leads out."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from onehour.files import append_whole, open_inside, opened, remove, replace_all, replace_whole, written_at

OLD = {"page": "old page", "figures/a": "old a", "figures/b": "old b"}
NEW = {"page": "new page", "figures/b": "new b", "figures/c": "new c"}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "thesis").write_text("thesis")
    return folder


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    folder = tmp_path / "inside"
    folder.mkdir()
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


WRITERS: dict[str, Callable[[Path, str], object]] = {
    "replace_whole": lambda folder, name: replace_whole(folder, name, "new"),
    "replace_all": lambda folder, name: replace_all(folder, {name: "new"}),
    "append_whole": lambda folder, name: append_whole(folder, name, b"new"),
    "open_inside": lambda folder, name: os.close(open_inside(folder, name, os.O_WRONLY | os.O_CREAT)),
    "remove": remove,
    "opened": lambda folder, name: opened(folder, name, make=True).__enter__(),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("name", ["link", "folder/link", "folder/linked/new", "linked/new", "linked/thesis"])
def test_no_link_leads_out(inside: Path, outside: Path, write: Callable[[Path, str], object], name: str):
    """The last name may be replaced or refused; a folder on the way is refused."""
    (inside / "folder").mkdir()
    for link in (inside / "link", inside / "folder" / "link"):
        link.symlink_to(outside / "thesis")
    for link in (inside / "linked", inside / "folder" / "linked"):
        link.symlink_to(outside)
    try:
        write(inside, name)
        refused = ""
    except ValueError as error:
        refused = str(error)
    assert content(outside) == {"thesis": "thesis"}
    if "linked" in name:
        assert (
            refused
            == f"{inside / name.rpartition('/')[0]} is a link, and what is written into a folder stays in it; remove it"
        )


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("name", ["../outside/thesis", "/etc/x", "a/../../x", "a//b", ".", "..", "a\0b", "/"])
def test_what_is_no_name_is_refused(inside: Path, outside: Path, write: Callable[[Path, str], object], name: str):
    with pytest.raises(ValueError, match="cannot name a file in"):
        write(inside, name)
    assert content(outside) == {"thesis": "thesis"}


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_lies_where_a_file_is_written_first_is_removed(inside: Path, outside: Path, kind: str):
    if kind == "link":
        (inside / ".a.writing").symlink_to(outside / "thesis")
    else:
        (inside / ".a.writing").write_text("left by a killed process")
    replace_whole(inside, "a", "new")
    assert content(inside) == {"a": "new"}
    assert content(outside) == {"thesis": "thesis"}


def test_a_link_where_files_are_put_aside_is_refused(inside: Path, outside: Path):
    (inside / ".writing").symlink_to(outside)
    with pytest.raises(ValueError, match=r"\.writing is a link"):
        replace_all(inside, NEW)
    assert content(outside) == {"thesis": "thesis"}


def test_what_a_killed_process_put_aside_is_removed(inside: Path):
    (inside / ".writing" / "deep").mkdir(parents=True)
    (inside / ".writing" / "new-0").write_text("half")
    replace_all(inside, NEW)
    assert content(inside) == NEW
    assert sorted(path.name for path in inside.iterdir()) == ["figures", "page"]


@pytest.mark.parametrize("name", ["append_whole", "open_inside"])
def test_a_pipe_is_no_file(inside: Path, name: str):
    """Opening it would wait for a reader."""
    os.mkfifo(inside / "pipe")
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        WRITERS[name](inside, "pipe")


def test_a_folder_is_not_replaced_by_a_file(inside: Path):
    (inside / "page").mkdir()
    (inside / "page" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="page is a folder"):
        replace_all(inside, NEW)
    assert content(inside) == {"page/mine": "mine"}


def test_a_folder_that_a_person_names_may_be_a_link(inside: Path, tmp_path: Path):
    (tmp_path / "mine").symlink_to(inside)
    replace_whole(tmp_path / "mine", "a", "new")
    assert content(inside) == {"a": "new"}


def test_a_folder_that_is_held_open_is_written_wherever_its_name_leads(inside: Path, outside: Path, tmp_path: Path):
    with opened(inside) as held:
        inside.rename(tmp_path / "moved")
        inside.symlink_to(outside)
        replace_whole(held, "a", "new")
        append_whole(held, "a", b"er")
    assert content(tmp_path / "moved") == {"a": "newer"}
    assert content(outside) == {"thesis": "thesis"}


def operations(folder: Path, fail: int | None) -> list[str]:
    """What `replace_all` asks of the system; the one at place `fail` is refused."""
    seen: list[str] = []

    def around(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def operation(*arguments: Any, **options: Any) -> Any:
            seen.append(name)
            if len(seen) - 1 == fail:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[:3])
                if name == "close":
                    real(*arguments)
                raise OSError(errno.ENOSPC, "full")
            return real(*arguments, **options)

        return operation

    names = ("open", "write", "fsync", "close", "mkdir", "link", "rename", "unlink", "rmdir", "stat", "listdir")
    patches = [mock.patch.object(os, name, around(name)) for name in names]
    for patch in patches:
        patch.start()
    try:
        replace_all(folder, NEW, gone=["figures/a"])
    finally:
        for patch in patches:
            patch.stop()
    return seen


def test_files_that_belong_together_are_all_old_or_all_new_whichever_operation_fails(tmp_path: Path):
    replace_all(tmp_path / "whole", OLD)
    count = len(operations(tmp_path / "whole", None))
    assert content(tmp_path / "whole") == NEW
    assert count > 50
    for place in range(count):
        folder = tmp_path / str(place)
        replace_all(folder, OLD)
        failed = True
        with suppress(OSError):
            operations(folder, place)
            failed = False
        found = {name: text for name, text in content(folder).items() if not name.startswith(".writing")}
        assert found in ((OLD, NEW) if failed else (NEW,)), (place, found)
        replace_all(folder, NEW, gone=["figures/a"])
        assert content(folder) == NEW
        assert sorted(path.name for path in folder.iterdir()) == ["figures", "page"]


def test_without_second_names_an_old_file_is_put_back_too(tmp_path: Path):
    replace_all(tmp_path, OLD)
    real = os.rename

    def rename(old: str, new: str, **options: Any) -> None:
        if new == "c":
            raise OSError(errno.EIO, "broken")
        real(old, new, **options)

    refused = mock.patch.object(os, "link", side_effect=OSError(errno.EPERM, "no links here"))
    with refused, mock.patch.object(os, "rename", rename), pytest.raises(OSError, match="broken"):
        replace_all(tmp_path, NEW)
    assert {name: text for name, text in content(tmp_path).items() if not name.startswith(".writing")} == OLD


def test_what_a_full_disk_takes_of_an_append_is_cut_off(inside: Path):
    append_whole(inside, "a", b"one\n")
    real = os.write

    def half(file: int, content: bytes) -> int:
        real(file, bytes(content)[:2])
        raise OSError(errno.ENOSPC, "full")

    with mock.patch.object(os, "write", half), pytest.raises(OSError, match="full"):
        append_whole(inside, "a", b"two\n")
    assert content(inside) == {"a": "one\n"}


def test_of_several_that_write_at_once_the_last_one_wins_as_a_whole(inside: Path):
    names = [f"figures/{number}" for number in range(20)]

    def write(text: str) -> None:
        for _ in range(10):
            replace_all(inside, dict.fromkeys(names, text))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, "abcd"))
    assert len(set(content(inside).values())) == 1
    assert [path.name for path in inside.iterdir()] == ["figures"]


def read(file: Path) -> str:
    return file.read_text()


@pytest.mark.parametrize("checked", [False, True])
def test_what_a_person_names_is_written_behind_a_link_and_into_a_pipe(tmp_path: Path, checked: bool):
    seen: list[str] = []
    check: Any = (lambda path: seen.append(read(path))) if checked else None
    (tmp_path / "link").symlink_to("new/target")
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        with written_at(tmp_path / name, check=check) as file:
            file.write(name.encode())
    assert os.read(pipe, 99) == b"pipe"
    os.close(pipe)
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "new" / "target") == "link"
    assert seen == ["link", "pipe"] * checked


def test_what_standard_output_goes_to_is_not_replaced(tmp_path: Path):
    with (tmp_path / "out").open("w") as out:
        out.write("before ")
        out.flush()
        code = "from pathlib import Path\nfrom onehour.files import written_at\n"
        code += "with written_at(Path('/dev/stdout')) as file: file.write(b'after')"
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
        out.write(" and more")
    assert (tmp_path / "out").read_text() == "before after and more"

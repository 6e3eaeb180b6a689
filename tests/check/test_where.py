"""Which line is the user's."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from onehour.check.observe import source
from onehour.check.observe.source import called_directly, is_users, maker_line, user_line

SOURCE = """
class Made:
    def __init__(self, ask):
        self.place = ask(self)


def make(ask):
    return Made(ask)


def call(function):
    return function()
"""


@pytest.fixture
def user(tmp_path: Path) -> dict[str, Any]:
    """A module of the user's."""
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    names: dict[str, Any] = {"path": path}
    exec(compile(SOURCE, str(path), "exec"), names)
    return names


def test_the_innermost_line_of_the_user_s(user: dict[str, Any]):
    assert user["call"](user_line) == f"{user['path']}:12"


def test_what_is_made_is_made_by_another(user: dict[str, Any]):
    """Not in its own constructor, which only calls that of its base class."""
    assert user["make"](lambda made: user_line()).place != f"{user['path']}:8"
    assert user["make"](lambda made: maker_line(made, 2)).place == f"{user['path']}:8"


def test_whether_a_library_stands_between(user: dict[str, Any], tmp_path: Path):
    assert user["call"](called_directly)
    library = tmp_path / "site-packages" / "library.py"
    names: dict[str, Any] = {}
    exec(compile("def through(function):\n    return function()\n", str(library), "exec"), names)
    assert user["call"](lambda: names["through"](called_directly)) is False


def test_libraries_are_not_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not any(is_users(file) for file in (os.__file__, torch.__file__, "<stdin>"))
    script = tmp_path / "site-packages" / "package" / "train.py"
    assert not is_users(str(script))
    monkeypatch.setattr(source, "SCRIPT_FOLDERS", {str(script.parent)})
    is_users.cache_clear()
    assert is_users(str(script))  # unless it is what is checked
    is_users.cache_clear()

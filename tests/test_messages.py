"""What is shown is one line that any output can take, and offers the nearest name."""

import subprocess
import sys

import pytest

from onehour.messages import nearest, shown

PRINTS = "from onehour.messages import escape_output; escape_output(); print('γ = 0')"
TRAINS = (
    "from onehour.training.console import Console; from onehour.config import Recipe;"
    " c = Console(Recipe(), quiet=False)"
)
SAYS = TRAINS + "; c.warn('γ = 0'); c.close()"


@pytest.mark.parametrize(
    ("code", "encoding", "escaped"),
    [
        (PRINTS, "ascii", "\\u03b3 = 0"),
        (PRINTS, "latin-1", "\\u03b3 = 0"),
        (PRINTS, "utf-8", "γ = 0"),
        (SAYS, "ascii", "\\u03b3 = 0"),
    ],
)
def test_a_letter_that_an_encoding_lacks_is_an_escape(code: str, encoding: str, escaped: str):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": encoding}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert escaped in done.stdout.decode(encoding)


def test_plain_text_is_shown_as_it_is():
    assert shown("é <b> 日本") == "é <b> 日本"


@pytest.mark.parametrize(
    ("word", "offered"), [("resnet5", "resnet50"), ("digit", "digits"), ("zzz", "one of digits, resnet50")]
)
def test_the_nearest_name_is_offered_else_all(word, offered):
    assert nearest(word, iter(["digits", "resnet50"])) == offered

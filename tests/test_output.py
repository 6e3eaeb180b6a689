"""Output that cannot show a letter ends nothing."""

import subprocess
import sys

import pytest

PRINTS = "from onehour.output import printable; printable(); print('γ = 0')"
TRAINS = (
    "from onehour.training.console import Console; from onehour.config import Recipe;"
    " c = Console(Recipe(), quiet=False)"
)
SAYS = TRAINS + "; c.warn('γ = 0'); c.close()"


@pytest.mark.parametrize("code", [PRINTS, SAYS], ids=["a command", "a run from Python"])
@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", "\\u03b3 = 0"), ("latin-1", "\\u03b3 = 0"), ("utf-8", "γ = 0")]
)
def test_a_letter_that_an_encoding_lacks_is_an_escape(code: str, encoding: str, shown: str):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={"PYTHONIOENCODING": encoding}, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout.decode(encoding)

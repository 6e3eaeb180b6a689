"""Rules and the check are imported where there are neither Unix's file locks nor its terminals."""

import subprocess
import sys

ALL = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(("fcntl", "termios", "pty", "tty", "resource", "grp", "pwd"))  # as if there were none
import onehour.check.run.checking, onehour.rules
print("torch" in sys.modules)  # the command waits for none
for room in (onehour.check, onehour.rules):
    for module in pkgutil.walk_packages(room.__path__, f"{room.__name__}."):
        importlib.import_module(module.name)
    print(room.__name__, len([getattr(room, name) for name in getattr(room, "__all__", ())]))
"""


def test_they_need_no_system_of_their_own_and_the_command_no_torch():
    done = subprocess.run([sys.executable, "-c", ALL], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.split()[:2] == ["False", "onehour.check"]

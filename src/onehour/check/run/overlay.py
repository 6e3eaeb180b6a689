"""A second place for what a script writes: its own files stay as they are, and it reads back what it wrote."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_OPEN = "/proc/self/fd/"
_GONE = ".onehour-gone."  # in front of the name of a file that the script has removed
_CACHES = ("torchinductor_",)
"""What torch keeps in the temporary folder from run to run; the compilers that read it know no overlay."""


class Overlay:
    """Maps paths that are written to paths below a folder; reading finds the newer of both.

    What lies directly above `root` is never redirected, nor is what the kernel keeps. The contents of `home` folders
    are kept wherever they lie. Elsewhere names that are new in the system's temporary folder are free; what stood
    there before is kept with all below it.

    >>> overlay = Overlay("/tmp/run/x", home=["/data/me"])
    >>> overlay.upper("/data/me/log.txt"), overlay.upper("/dev/null") is None
    ('/tmp/run/x/data/me/log.txt', True)
    """

    def __init__(self, root: str | Path, home: list[str], kept: Sequence[str] = ()) -> None:
        self.root = os.path.abspath(root)
        self.home = [os.path.join(os.path.abspath(folder), "") for folder in home]
        above = os.path.dirname(self.root)  # the run's own folder
        self.free = [os.path.join(path, "") for path in ("/dev", "/proc", "/sys", above, *kept)]
        self.linked = False  # whether the script has made symbolic links: what is below one is kept where that leads
        self.temporary = os.path.join(os.path.realpath(tempfile.gettempdir()), "")
        self.before = frozenset(name for name in _listdir(self.temporary) if not name.startswith(_CACHES))

    def named(self, path: Any, folder: int | None = None) -> Any:
        """The path by the name that the script knows: it is below an open folder, or below /proc/self/fd/N."""
        if not isinstance(path, str | bytes | os.PathLike):
            return path
        text = os.fsdecode(path)
        if folder is None:
            number, _, text = text.removeprefix(_OPEN).partition(os.sep)
            if not os.fsdecode(path).startswith(_OPEN) or not text or not number.isdigit():
                return path
            folder = int(number)
        above = self.of_descriptor(folder)
        if above is None:
            return path
        name = os.path.join(above, text)
        return os.fsencode(name) if isinstance(path, bytes) else name

    def of_descriptor(self, number: int) -> str | None:
        """The path of an open file by the name that the script knows; None for what has none."""
        try:
            path = _readlink(f"{_OPEN}{number}")
        except OSError:
            return None
        return (path.removeprefix(self.root) or os.sep) if path.startswith(os.sep) else None

    def upper(self, path: Any) -> str | None:
        """Where a path is written instead; None for what is not a path, or may be written where it is."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        real = os.path.abspath(os.fsdecode(path))
        if real.startswith(tuple(self.free)):
            return None
        if self.linked:
            real = self._followed(real)
        below = real.removeprefix(self.temporary)
        if below != real and not os.path.join(real, "").startswith(tuple(self.home)):
            return self.root + real if below.split(os.sep)[0] in self.before else None
        return self.root + real

    def _followed(self, real: str) -> str:
        """The path without the symbolic links to folders that the script has made on its way."""
        place, tail = self.root, real.split(os.sep)[1:]
        for number, part in enumerate(tail[:-1], 1):
            place = os.path.join(place, part)
            if _islink(place):
                return self._followed(os.path.abspath(os.path.join(self._target(place), *tail[number:])))
        return real

    def read(self, path: Any, *, follow: bool = True) -> Any:
        """The path to read: what the script wrote, if it did; one that does not exist if it was removed.

        With `follow` a link that the script has made stands for what it leads to.
        """
        upper = self.upper(path)
        if upper is None:
            return path
        if _islink(upper):
            return self.read(self._target(upper)) if follow else upper
        if _exists(upper) or self._gone(upper):
            return upper
        return self._lower(upper) if self.linked else path

    def write(self, path: Any, *, keep: bool, follow: bool = True) -> Any:
        """The path to write, its folder made if the script may think that there is one.

        With `keep` what stands there is added to or changed, and so is copied first; `follow` is as in `read`.
        """
        upper = self.upper(path)
        if upper is None:
            return path
        if follow and _islink(upper):
            return self.write(self._target(upper), keep=keep)
        lower = self._lower(upper)
        above, below = os.path.dirname(upper), os.path.dirname(lower)
        if not (_exists(above) or (_isdir(below) and not self._gone(above))):
            return upper if _isdir(below) else path  # which then fails as it would have
        _makedirs(above)
        if keep and not _exists(upper) and not self._gone(upper) and _exists(lower) and not _isdir(lower):
            _copy(lower, upper)
        return upper

    def _lower(self, upper: str) -> str:
        """Where it lies that a path would be written in place of."""
        return upper.removeprefix(self.root)

    def _target(self, upper: str) -> str:
        return self._lower(os.path.join(os.path.dirname(upper), _readlink(upper)))

    def remove(self, path: Any) -> None:
        """Take a file or an empty folder away, as far as the script can see."""
        upper = self.upper(path)
        assert upper is not None
        if not (_islink(upper) or _exists(self.read(path))):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        if _isdir(upper) and not _islink(upper):
            _rmtree(upper)
        elif _exists(upper) or _islink(upper):
            _unlink(upper)
        if _exists(self._lower(upper)):
            _makedirs(os.path.dirname(upper))
            Path(self._mark(upper)).touch()

    def names(self, path: Any) -> list[str] | None:
        """What a folder holds for the script; None where nothing of it was written or removed."""
        upper = self.upper(path)
        if upper is None or not _isdir(upper):
            return None
        added = _listdir(upper)
        gone = {name.removeprefix(_GONE) for name in added if name.startswith(_GONE)}
        lower = self._lower(upper)
        below = set(_listdir(lower)) - gone if _isdir(lower) and not self._gone(upper) else set()
        return sorted(below | {name for name in added if not name.startswith(_GONE)})

    def below(self, path: Any) -> bool:
        """Whether the script sees something of its own there that was before it."""
        upper = self.upper(path)
        return _exists(path) if upper is None else _exists(self._lower(upper)) and not self._gone(upper)

    def _mark(self, upper: str) -> str:
        return os.path.join(os.path.dirname(upper), _GONE + os.path.basename(upper))

    def _gone(self, upper: str) -> bool:
        while len(upper) > len(self.root):
            if _exists(self._mark(upper)):
                return True
            upper = os.path.dirname(upper)
        return False


# As they were before anyone stood before them.
_stat, _lstat, _unlink, _listdir, _rmtree = os.stat, os.lstat, os.unlink, os.listdir, shutil.rmtree
_mkdir, _readlink, _open = os.mkdir, os.readlink, open


def _mode(path: Any, look: Callable[[Any], os.stat_result] = _stat) -> int:
    """0 where nothing is there."""
    try:
        return look(path).st_mode
    except (OSError, ValueError):
        return 0


def _exists(path: Any) -> bool:
    return _mode(path) != 0


def _islink(path: str) -> bool:
    return stat.S_ISLNK(_mode(path, _lstat))


def _isdir(path: Any) -> bool:
    return stat.S_ISDIR(_mode(path))


def _makedirs(path: str) -> None:
    if not _isdir(path):
        _makedirs(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):  # another process was first
            _mkdir(path)


def _copy(source: str, target: str) -> None:
    with _open(source, "rb") as reading, _open(target, "wb") as writing:
        while block := reading.read(1 << 20):
            writing.write(block)

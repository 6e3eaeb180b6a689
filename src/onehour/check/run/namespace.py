"""A mount namespace in which a script's files are copied when they are written (Linux's overlayfs): C libraries and
other programs write there, too, and nothing of it outlives the namespace.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
_LINUX_CAPABILITY_VERSION_3 = 0x20080522
_SHARED = ("/dev", "/proc", "/sys", "/run")  # devices, processes and sockets are those of the machine


def enter(folder: Path, needed: list[str]) -> list[str]:
    """Move this process, which has one thread, into a namespace whose files are copies in memory once they are written.

    The folder stays shared with the machine outside. Returns the folders whose files stay as they are: where other file
    systems are mounted below a folder, each of the folders in it, and files directly in it are not among them. An
    OSError if the kernel does not permit it, or a needed folder is not kept.
    """
    own_user = not _permitted(_CLONE_NEWNS)
    if own_user:
        _own_user()
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    layers = folder / "layers"
    layers.mkdir()
    known = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    mounts = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[4]) for line in known]
    roots = list(_roots("/", mounts))
    _mount("tmpfs", str(layers), "tmpfs")
    os.setxattr(layers, "user.onehour" if own_user else "trusted.onehour", b"")  # overlayfs must mark folders there
    kept = []
    with _by_number(str(folder)) as outside, _by_number(str(layers)) as inside:  # both will be covered
        for number, root in enumerate(roots):
            with contextlib.suppress(OSError):
                _cover(root, Path(inside, str(number)), ",userxattr" if own_user else "")
                kept.append(os.path.join(root, ""))
        _mount(outside, str(folder), "", _MS_BIND)
    missing = [path for path in needed if not os.path.join(path, "").startswith(tuple(kept))]
    if missing:
        raise OSError(f"{missing[0]} cannot be kept")
    if own_user:  # what its user may not do outside stays refused
        header = (ctypes.c_uint32 * 2)(_LINUX_CAPABILITY_VERSION_3, 0)
        ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())
    return kept


def _permitted(flags: int) -> bool:
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    return unshare is not None and unshare(flags) == 0


def _own_user() -> None:
    """A namespace of users in which this one may mount."""
    user, group = os.geteuid(), os.getegid()
    if user == 0 or not _permitted(_CLONE_NEWUSER | _CLONE_NEWNS):  # a root without the right would lose others
        raise OSError("namespaces are not permitted")
    Path("/proc/self/setgroups").write_text("deny", encoding="utf-8")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="utf-8")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="utf-8")


def _mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    texts = [os.fsencode(text) for text in (source, target, kind)]
    if libc.mount(*texts, ctypes.c_ulong(flags), os.fsencode(options)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), target)


def _roots(folder: str, mounts: list[str]) -> Iterator[str]:
    """The largest folders in one below which nothing is mounted."""
    if folder in _SHARED or not os.access(folder, os.R_OK | os.X_OK):
        return
    if not any(mount.startswith(os.path.join(folder, "")) and mount != folder for mount in mounts):
        yield folder
        return
    with os.scandir(folder) as entries:
        inside = sorted(entry.path for entry in entries if entry.is_dir(follow_symlinks=False))
    for path in inside:
        yield from _roots(path, mounts)


def _cover(folder: str, layer: Path, options: str) -> None:
    """Mount an overlay on a folder, which takes all that is written in it to a layer."""
    upper, work = layer / "upper", layer / "work"
    for path in (upper, work):
        path.mkdir(parents=True)
    known = os.stat(folder)
    mode = stat.S_IMODE(known.st_mode)
    try:
        os.chown(upper, known.st_uid, known.st_gid)
    except OSError:  # of a user who does not exist in the namespace
        mode &= ~0o222 if not os.access(folder, os.W_OK) else mode
    os.chmod(upper, mode)
    with _by_number(folder) as lower:  # commas and colons in its name would be read as options
        paths = f"lowerdir={lower},upperdir={upper},workdir={work}"
        _mount("overlay", folder, "overlay", options=paths + options)


@contextlib.contextmanager
def _by_number(folder: str) -> Iterator[str]:
    """A name of an open folder that stays right whatever is mounted on it."""
    descriptor = os.open(folder, os.O_PATH)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)

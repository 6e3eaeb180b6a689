"""`onehour data`: index, pack and examine folders of images."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onehour.dist.signals import StopSignals
from onehour.rules.arguments import positive_int

if TYPE_CHECKING:
    from onehour.data.processes import Done


def add_data(commands: Any) -> None:
    data = commands.add_parser(
        "data",
        help="index, pack or examine a folder of images",
        description="A folder of images is DIR/train/CLASS/* and DIR/val/CLASS/*. `onehour train --data` takes it, its"
        " index or a pack, and trains on the same samples.",
    )
    kinds = data.add_subparsers(metavar="COMMAND", required=True, parser_class=type(data))
    index = kinds.add_parser(
        "index",
        help="save the list of a folder's images, so that later starts need not list them",
        description="Write DIR/onehour.index, which a start takes in place of listing DIR, and which notices changes.",
    )
    index.add_argument("folder", type=Path, metavar="DIR", help="holds train/CLASS/* and val/CLASS/*")
    index.add_argument("--out", type=Path, metavar="FILE", help="where to write, ending in .index (DIR/onehour.index)")
    index.add_argument("--digests", action="store_true", help="keep a CRC-32 of each file, compared at every read")
    _add_jobs(index)
    index.set_defaults(command=index_command)
    pack = kinds.add_parser(
        "pack",
        help="pack a folder of images into a few tar files",
        description="Write tar files that tar and WebDataset read, and an index to read them at any place. Files stay"
        " byte for byte as they are, unless --resize makes them smaller. The same command again goes on.",
    )
    pack.add_argument("folder", type=Path, metavar="DIR", help="a folder of images, its index or another pack")
    pack.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    pack.add_argument(
        "--resize", type=int, metavar="PX", help="shorter side of larger images; recorded in every result"
    )
    _add_pixel_cap(pack)
    pack.add_argument("--shard-mib", type=int, default=1024, metavar="MIB", help="size of a tar file (1024)")
    _add_jobs(pack)
    pack.set_defaults(command=pack_command)
    doctor = kinds.add_parser(
        "doctor",
        help="report everything wrong with a folder, its index or a pack, in one pass",
        description="Read and decode every image; with an index, compare too. Exits with 0 if nothing is wrong, 1 if"
        " something is; notes do not count.",
    )
    doctor.add_argument("folder", type=Path, metavar="DIR|OUT", help="a folder of images, its index or a pack")
    _add_pixel_cap(doctor)
    doctor.add_argument("--json", action="store_true", help="print a list as JSON")
    _add_jobs(doctor)
    doctor.set_defaults(command=doctor_command)


def index_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.data.index import write_index

    if options.out is not None and options.out.suffix != ".index":
        raise ValueError(f"--out is {options.out}; expected a name that ends in .index, by which --data knows it")
    with _progress("indexing") as done:
        path = write_index(options.folder, options.out, digests=options.digests, jobs=_jobs(options), done=done)
    print(f"wrote {path}")
    return 0


def pack_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.data.images import open_sides
    from onehour.data.pack import pack

    if options.pixel_cap is not None and options.resize is None:
        raise ValueError(
            f"--pixel-cap {options.pixel_cap} is for --resize, without which nothing is decoded; leave it out"
        )
    pixels = _pixels(options)
    resize = None if options.resize is None else positive_int("--resize", options.resize)
    shard_bytes = positive_int("--shard-mib", options.shard_mib) * 2**20
    sides = open_sides(options.folder, sizes=True)
    images = sum(len(source.labels) for source in sides.values())
    with _progress("packing", images) as done:
        path = pack(
            sides,
            options.out,
            resize=resize,
            pixels=pixels,
            shard_bytes=shard_bytes,
            jobs=_jobs(options),
            done=done,
        )
    print(f"wrote {path.parent}: {images:,} images{f', shorter side {resize} at most' if resize else ''}")
    return 0


def doctor_command(options: argparse.Namespace, arguments: list[str]) -> int:
    from onehour.data.doctor import examine

    pixels = _pixels(options)
    with _progress("reading") as done:
        faults = examine(options.folder, pixels=pixels, jobs=_jobs(options), done=done)
    wrong = sum(not fault.note for fault in faults)
    if options.json:
        keys = ("path", "problem", "remedy", "note")
        print(json.dumps([{key: getattr(fault, key) for key in keys} for fault in faults], indent=2))
        return int(wrong > 0)
    for fault in faults:
        print(f"{'note: ' if fault.note else ''}{fault}")
    counts = f"{wrong} fault{'s' * (wrong != 1)}, {len(faults) - wrong} note{'s' * (len(faults) - wrong != 1)}"
    print(f"{options.folder}: {counts if faults else 'nothing found'}")
    return int(wrong > 0)


def _add_pixel_cap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pixel-cap", type=int, metavar="PIXELS", help="refuse images of more pixels (64 million)")


def _pixels(options: argparse.Namespace) -> int:
    from onehour.data.decode import LARGEST_PIXELS, PIXELS

    if options.pixel_cap is None:
        return PIXELS
    if positive_int("--pixel-cap", options.pixel_cap) > LARGEST_PIXELS:
        raise ValueError(f"--pixel-cap is {options.pixel_cap}; expected at most {LARGEST_PIXELS}, Pillow's own limit")
    return options.pixel_cap


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=int, metavar="J", help="processes to read with (cores)")


def _jobs(options: argparse.Namespace) -> int:
    from onehour.machine import cores

    return cores() if options.jobs is None else positive_int("--jobs", options.jobs)


@contextmanager
def _progress(what: str, total: int | None = None) -> Iterator[Done]:
    """A bar on a terminal; nothing elsewhere. A signal is one line: the same command goes on, or does no harm."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    terminal = Console()
    # Without a thread that draws: processes are forked while the bar is there.
    bar = Progress(*columns, console=terminal, transient=True, auto_refresh=False, disable=not terminal.is_terminal)
    task, drawn = bar.add_task(what, total=total), 0.0

    def done(items: int) -> None:
        nonlocal drawn
        bar.advance(task, items)
        if time.monotonic() - drawn > 0.1:
            drawn = time.monotonic()
            bar.refresh()

    with StopSignals(text="stopped; the same command goes on, or begins again"), bar:
        yield done

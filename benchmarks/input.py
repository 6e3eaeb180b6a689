"""Reading ImageNet-like JPEGs into training crops: ours, torchvision's transform on PIL, lean Pillow; interleaved.

    python benchmarks/input.py [--images 600] [--rounds 9] [--loaders 1] [--against SRC]

Uint8 crops of 224, from files in a folder: first in one process (per CPU second of one thread), then through loader
processes (per CPU second of all processes, and by the clock), torch's DataLoader for the others. Every round takes all
sides in another order; ratios are within rounds, above 1 is faster; medians. Then what a batch costs beside its images,
and what the first one costs. With --against, the src of another state of this repository, that state's loader too, each
side in a process of its own, in pairs: the median of their ratios and its 95 % interval. torchvision is left out where
it is not installed (`pip install --no-deps torchvision`; its missing operators do no harm). About four minutes on two
cores. Writes results/input.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import onehour
from imagenetlike import folder
from onehour.data.augment import SIZE, draw_crop
from onehour.data.dataset import KeyedDataset
from onehour.data.images import Images, image_folder, open_sides
from onehour.data.loader import Feed
from onehour.data.pack import pack
from onehour.rules.minibatch import Minibatch
from onehour.rules.shuffle import SampleStream
from results import write

CPU = torch.device("cpu")
BATCH = 32
WARM = 8
"""Batches before anything is measured: a new process first copies the pages that it writes to."""
IMAGENET = 1_281_167
CLAIMS = [
    ("times torchvision's transform on PIL, per CPU second of one thread", "cpu_over_torchvision", "≥", 1.6),
    ("the same through the loader, per CPU second of all processes", "loader_cpu_over_torchvision", "≥", 1.6),
    ("the same through the loader, by the clock", "loader_wall_over_torchvision", "≥", 1.6),
    ("times lean Pillow, per CPU second of one thread", "cpu_over_pillow", "≥", 1.25),
    ("the same through the loader, per CPU second of all processes", "loader_cpu_over_pillow", "≥", 1.25),
    ("the same through the loader, by the clock", "loader_wall_over_pillow", "≥", 1.25),
    ("share of the decode rate that one loader delivers", "delivered_share", "≥", 0.95),
    ("microseconds of CPU to collate and transfer an image", "collate_transfer_us", "≤", 60),
    ("CPU seconds to the first batch, at any iteration of ImageNet's stream", "first_batch_seconds", "≤", 0.2),
    ("times the older state's loader, per CPU second of all processes", "loader_cpu_over_older", "≥", 0.95),
]


class Raw(Images):
    """Our crops without the normalisation, which belongs to the device."""

    def prepare(self, images: Tensor) -> Tensor:
        """As they are."""
        return images


class Ready(KeyedDataset):
    """Crops that are in the cache, as one that was just made is: nothing but batches costs anything.

    Args:
        planes: their channels lie behind each other, so that a batch is copied as it is for a GPU; else together, as
            those of images do, and a batch is given the order that networks want on a CPU.
    """

    def __init__(self, *, planes: bool) -> None:
        crops = torch.randint(0, 256, (4, SIZE, SIZE, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        self.crops = crops.contiguous() if planes else crops

    def __len__(self) -> int:
        return 4096

    def keyed(self, index: int, key: int = 0) -> tuple[Tensor, int]:
        """One of them."""
        return self.crops[index % 4], index

    __getitem__ = keyed


class Large(KeyedDataset):
    """A data set as if it had ImageNet's number of images."""

    def __init__(self, dataset: Raw) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return IMAGENET

    def keyed(self, index: int, key: int) -> tuple[Tensor, int]:
        """One of those that are there."""
        return self.dataset.keyed(index % len(self.dataset), key)


class Lean(Dataset[tuple[Tensor, int]]):
    """Pillow alone: decode, then one resize of the crop's box."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with open(self.paths[index], "rb") as file:
            image = Image.open(io.BytesIO(file.read())).convert("RGB")
        top, left, height, width, flip = draw_crop(image.height, image.width, random.getrandbits(63))
        box = (left, top, left + width, top + height)
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), 0


class Torchvision(Dataset[tuple[Tensor, int]]):
    """torchvision's transform on PIL images, as its reference training has it, ending in bytes as ours."""

    def __init__(self, paths: list[str]) -> None:
        # Its wheels for CUDA do not load their operators beside a CPU build of torch; their registration is left out.
        sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
        transforms = importlib.import_module("torchvision.transforms")
        steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
        self.paths, self.transform = paths, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with open(self.paths[index], "rb") as file:
            return self.transform(Image.open(file).convert("RGB")), 0


def decode_rate(dataset: Any, order: list[int]) -> tuple[float, float]:
    """Images per CPU second and per second of this process, without a loader."""
    keyed = getattr(dataset, "keyed", None)
    cpu, wall = time.process_time(), time.perf_counter()
    for index in order:
        if keyed is None:
            dataset[index]
        else:
            keyed(index, index)
    return len(order) / (time.process_time() - cpu), len(order) / (time.perf_counter() - wall)


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of all threads of this process and of others."""
    found = [path.read_text().split()[0] for pid in pids for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return time.process_time() + sum(map(int, found)) / 1e9


def loader_rate(batches: Iterator[Any], pids: Callable[[], list[int]]) -> tuple[float, float]:
    """Images per CPU second of all processes and per second, after the first batches."""
    for _ in range(WARM):
        next(batches)
    before, wall, images, cpu, seconds = cpu_seconds(pids()), time.perf_counter(), 0, 0.0, 0.0
    for batch in batches:
        images += len(batch[1])
        seconds, cpu = time.perf_counter() - wall, cpu_seconds(pids()) - before  # the processes end with the last batch
    return images / cpu, images / seconds


def feed_of(dataset: Any, loaders: int) -> Feed:
    """Our loader, a worker of `BATCH` samples."""
    stream = SampleStream(samples=len(dataset), minibatch=Minibatch(BATCH, 1), seed=0)
    return Feed(dataset, seed=0, loaders=loaders, device=CPU, stream=stream)


def through_ours(dataset: Any, images: int, loaders: int) -> tuple[float, float]:
    """Our loader's rates."""
    feed = feed_of(dataset, loaders)
    rate = loader_rate(feed.passes([range(1)], start=0, stop=images // BATCH + WARM), lambda: feed.pids)
    feed.close()
    return rate


def through_plain(dataset: Dataset[Any], images: int, loaders: int) -> tuple[float, float]:
    """torch's DataLoader as it is usually called."""
    order = [index % len(dataset) for index in range(images + WARM * BATCH)]  # type: ignore[arg-type]
    loader = DataLoader(dataset, BATCH, sampler=order, num_workers=loaders, prefetch_factor=2)  # type: ignore[arg-type]
    running: Any = iter(loader)
    return loader_rate(running, lambda: [worker.pid for worker in running._workers])


def measure(sides: dict[str, Any], images: int, loaders: int, number: int) -> dict[str, dict[str, float]]:
    """One round: every side in turn, in another order each round."""
    names = list(sides)
    names = names[number % len(names) :] + names[: number % len(names)]
    order = list(range(images))
    random.Random(number).shuffle(order)
    found = {}
    for name in names:
        cpu, wall = decode_rate(sides[name], order)
        ours = isinstance(sides[name], Images)
        through = (through_ours if ours else through_plain)(sides[name], images, loaders)
        found[name] = {"cpu": cpu, "wall": wall, "loader_cpu": through[0], "loader_wall": through[1]}
    return found


def in_own_process(source: Path, folder: Path, options: argparse.Namespace) -> list[float]:
    """A state's rates through its loader; imported anew, since two cannot be in one process."""
    command = [sys.executable, __file__, "--images", str(options.images), "--loaders", str(options.loaders)]
    environ = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run([*command, "--rate", str(folder)], env=environ, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def against(older: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Ratios of our images per CPU second to an older state's, from pairs whose order alternates."""
    sources = {"ours": Path(onehour.__file__).parents[1], "older": older}
    pairs = []
    for number in range(options.rounds):
        names = list(sources)[:: -1 if number % 2 else 1]
        pairs.append({name: in_own_process(sources[name], folder, options)[0] for name in names})
    ratios = sorted(pair["ours"] / pair["older"] for pair in pairs)
    rank = int(stats.binom.ppf(0.025, len(ratios), 0.5)) - 1  # of the interval's ends, from either end
    low, high = ratios[max(rank, 0)], ratios[-1 - max(rank, 0)]
    return {"pairs": pairs, "median": round(statistics.median(ratios), 3), "interval": [round(low, 3), round(high, 3)]}


def beside_images(rounds: int, loaders: int) -> dict[str, Any]:
    """Microseconds of CPU that an image costs in all processes once it is cropped: medians, for a GPU and for a CPU."""

    def microseconds(planes: bool) -> float:
        found = [1e6 / through_ours(Ready(planes=planes), 200 * BATCH, loaders)[0] for _ in range(rounds)]
        return round(statistics.median(found), 1)

    return {"for_a_gpu": microseconds(True), "for_a_cpu": microseconds(False)}


def first_batches(dataset: Raw) -> dict[str, Any]:
    """Seconds to the first batch of a use, from any iteration on, the processes being up: at each another epoch.

    CPU seconds of this process, which makes the epoch's permutation; what the batch costs besides is the rates'.
    """
    large, loaders = Large(dataset), len(os.sched_getaffinity(0))
    feed = feed_of(large, loaders)
    starts = [1, 40_100, 80_200, 123_456, 234_567, 345_678, 456_789, 567_890, 678_901]
    next(feed.passes([range(1)], start=0, stop=1))
    seconds = []
    for start in starts:
        began = time.process_time()
        next(feed.passes([range(1)], start=start, stop=start + 1))
        seconds.append(round(time.process_time() - began, 4))
    feed.close()
    return {"loaders": loaders, "samples": IMAGENET, "seconds": seconds, "median": statistics.median(seconds)}


def summarise(rounds: list[dict[str, dict[str, float]]]) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Medians of rates, and of ratios within rounds."""

    def median(of: Callable[[dict[str, dict[str, float]]], float], digits: int) -> float:
        return round(statistics.median(of(found) for found in rounds), digits)

    names = list(rounds[0])
    rates = {
        name: {what: median(lambda found, n=name, w=what: found[n][w], 1) for what in rounds[0][name]} for name in names
    }
    ratios = {
        f"{what}_over_{other}": median(lambda found, o=other, w=what: found["ours"][w] / found[o][w], 3)
        for other in ("torchvision", "pillow")
        for what in ("cpu", "loader_cpu", "loader_wall")
        if other in names
    }
    ratios["delivered_share"] = median(lambda found: found["ours"]["loader_wall"] / found["ours"]["wall"], 3)
    ratios["packed_over_folder"] = median(lambda found: found["ours_packed"]["cpu"] / found["ours"]["cpu"], 3)
    return rates, ratios


def judged(measured: dict[str, float]) -> list[dict[str, Any]]:
    """What is promised, beside what was measured; without what was not."""
    claims = [
        {"claim": c, "relation": r, "bound": b, "measured": measured[k]} for c, k, r, b in CLAIMS if k in measured
    ]
    for claim in claims:
        more = claim["measured"] >= claim["bound"]
        claim["holds"] = more if claim["relation"] == "≥" else not more
    return claims


def main() -> int:
    """Measure, print and write; leaves with 1 where a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--loaders", type=int, default=1)
    parser.add_argument(
        "--against", type=Path, metavar="SRC", help="src of an older state, whose loader is measured too"
    )
    parser.add_argument("--rate", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.rate is not None:
        print(
            json.dumps(
                through_ours(Raw(image_folder(options.rate)[0].source, augmented=True), options.images, options.loaders)
            )
        )
        return 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        root = folder(Path(place) / "data", classes=4, train=options.images // 4, val=1)
        source = image_folder(root)[0].source
        paths = [source.name(index) for index in range(len(source.labels))]
        pack(open_sides(root, sizes=True), Path(place) / "pack")
        packed = image_folder(Path(place) / "pack")[0].source
        sides: dict[str, Any] = {"ours": Raw(source, augmented=True), "ours_packed": Raw(packed, augmented=True)}
        if importlib.util.find_spec("torchvision") is None:
            print("torchvision is not installed: it is left out")
        else:
            sides["torchvision"] = Torchvision(paths)
        sides["pillow"] = Lean(paths)
        for dataset in sides.values():
            decode_rate(dataset, list(range(min(50, len(paths)))))  # warm
        rounds = [measure(sides, len(paths), options.loaders, number) for number in range(options.rounds)]
        older = against(options.against, root, options) if options.against else {}
        beside, first = beside_images(options.rounds, options.loaders), first_batches(sides["ours"])
        load = os.getloadavg()[2]
        sizes = statistics.mean(os.path.getsize(path) for path in paths)
    rates, ratios = summarise(rounds)
    if older:
        ratios["loader_cpu_over_older"] = older["median"]
    claims = judged(ratios | {"collate_transfer_us": beside["for_a_gpu"], "first_batch_seconds": max(first["seconds"])})
    for name, found in rates.items():
        print(f"{name:12}", "  ".join(f"{what} {rate:.0f}/s" for what, rate in found.items()))
    for claim in claims:
        print(f"{claim['measured']:8.3f} {claim['relation']} {claim['bound']:<5} {claim['holds']!s:5} {claim['claim']}")
    about = {"images": len(paths), "mean_bytes": round(sizes), "loaders": options.loaders, "batch": BATCH}
    about["seconds"] = round(time.perf_counter() - began)
    about["load"] = round(load, 1)
    details = {"beside_images": beside, "first_batch": first, "older": older, "measured": rounds}
    write(__file__, "input", about | {"rates": rates, "ratios": ratios, "claims": claims} | details)
    return int(not all(claim["holds"] for claim in claims))


if __name__ == "__main__":
    sys.exit(main())

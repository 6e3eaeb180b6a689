"""Reading ImageNet-like JPEGs into training crops: ours, torchvision's transform on PIL, lean Pillow; interleaved.

    python benchmarks/input.py [--images 600] [--rounds 7] [--loaders 1]

Uint8 crops of 224, from files in a folder: first in one process (per CPU second of one thread), then through loader
processes (per CPU second of all processes, and by the clock), torch's DataLoader for the others. Every round takes all
sides in another order; ratios are within rounds, above 1 is faster; medians. Then what a batch costs beside its images,
and how soon the first one is there. torchvision is left out where it is not installed (`pip install --no-deps
torchvision`; its missing operators do no harm). About four minutes on two cores. Writes results/input.json.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import random
import statistics
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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

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
    ("seconds to the first batch, at any iteration of ImageNet's stream", "first_batch_seconds", "≤", 0.2),
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

    shape = (3, SIZE, SIZE)

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


def beside_images(rounds: int, loaders: int) -> dict[str, Any]:
    """Microseconds of CPU that an image costs in all processes once it is cropped: medians, for a GPU and for a CPU."""

    def microseconds(planes: bool) -> float:
        found = [1e6 / through_ours(Ready(planes=planes), 200 * BATCH, loaders)[0] for _ in range(rounds)]
        return round(statistics.median(found), 1)

    return {"for_a_gpu": microseconds(True), "for_a_cpu": microseconds(False)}


def first_batches(dataset: Raw) -> dict[str, Any]:
    """Seconds to the first batch of a use, from any iteration on, the processes being up: at each another epoch."""
    large, loaders = Large(dataset), len(os.sched_getaffinity(0))
    feed = feed_of(large, loaders)
    starts = [1, 40_100, 80_200, 123_456, 234_567, 345_678, 456_789, 567_890, 678_901]
    next(feed.passes([range(1)], start=0, stop=1))
    seconds = []
    for start in starts:
        began = time.perf_counter()
        next(feed.passes([range(1)], start=start, stop=start + 8))
        seconds.append(round(time.perf_counter() - began, 4))
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
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loaders", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
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
        beside, first = beside_images(options.rounds, options.loaders), first_batches(sides["ours"])
        sizes = statistics.mean(os.path.getsize(path) for path in paths)
    rates, ratios = summarise(rounds)
    claims = judged(ratios | {"collate_transfer_us": beside["for_a_gpu"], "first_batch_seconds": max(first["seconds"])})
    for name, found in rates.items():
        print(f"{name:12}", "  ".join(f"{what} {rate:.0f}/s" for what, rate in found.items()))
    for claim in claims:
        print(f"{claim['measured']:8.3f} {claim['relation']} {claim['bound']:<5} {claim['holds']!s:5} {claim['claim']}")
    about = {"images": len(paths), "mean_bytes": round(sizes), "loaders": options.loaders, "batch": BATCH}
    about["seconds"] = round(time.perf_counter() - began)
    details = {"beside_images": beside, "first_batch": first, "measured": rounds}
    write(__file__, "input", about | {"rates": rates, "ratios": ratios, "claims": claims} | details)
    return int(not all(claim["holds"] for claim in claims))


if __name__ == "__main__":
    sys.exit(main())

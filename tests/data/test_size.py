"""1.28 million samples: held once by the machine, open within seconds, and no growth however long a run is."""

import ctypes
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import images
import numpy as np
import pytest
import torch

from onehour.data.dataset import FaultError
from onehour.data.images import Images, image_folder
from onehour.data.index import FORMAT, _stamps, columns, write_arrays
from onehour.data.listing import SIDES, Names, Table
from onehour.data.loader import Feed
from onehour.rules.minibatch import Minibatch
from onehour.rules.shuffle import SampleStream

CPU = torch.device("cpu")
SAMPLES, CLASSES = {"train": 1_281_167, "val": 50_000}, 1000
LOADERS = 2


def table(count: int, classes: list[str]) -> Table:
    """Names as ImageNet's, made without a million Python objects."""
    labels = (np.arange(count, dtype=np.int64) * CLASSES // count).astype(np.int32)
    digits = np.stack([np.arange(count) // 10**place % 10 for place in range(6, -1, -1)], 1).astype(np.uint8) + 48
    prefix, suffix = (np.tile(np.frombuffer(text, np.uint8), (count, 1)) for text in (b"n01440764_", b".JPEG"))
    buffer = np.concatenate([prefix, digits, suffix], 1)
    ends = np.arange(count + 1, dtype=np.int64) * buffer.shape[1]
    return Table(classes, labels, Names(buffer.reshape(-1), ends), np.full(count, 110_000, np.int64), None)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 1.33 million files that are not there, in class folders that are."""
    root = tmp_path_factory.mktemp("large")
    classes = [f"n{number:08d}" for number in range(CLASSES)]
    arrays: dict[str, np.ndarray] = {}
    for side in SIDES:
        for name in classes:
            (root / side / name).mkdir(parents=True)
        arrays |= columns(side, table(SAMPLES[side], classes), np.arange(SAMPLES[side], dtype=np.uint32))
    stamps = {side: _stamps(root / side) for side in SIDES}
    about = {"format": FORMAT, "kind": "folder", "root": ".", "classes": classes}
    write_arrays(
        root / "onehour.index", arrays, about | {"stamps": {s: [stamps[s][n] for n in classes] for s in SIDES}}
    )
    return root / "onehour.index"


class Everywhere:
    """Looks at all of an index once in each process, and gives one image for all."""

    def __init__(self, source: object, image: bytes) -> None:
        self.source, self.image, self.looked = source, image, False
        self.labels, self.classes = source.labels, source.classes  # type: ignore[attr-defined]

    def name(self, index: int) -> str:
        return self.source.name(index)  # type: ignore[attr-defined]

    def read(self, index: int) -> bytes:
        if not self.looked:
            found = self.source.table  # type: ignore[attr-defined]
            assert sum(int(array.sum()) for array in (found.labels, found.names.buffer, found.sizes, found.checks)) > 0
            self.looked = True
        return self.image


def feed(index: Path, per_worker: int = 32, loaders: int = LOADERS) -> Feed:
    train, _ = image_folder(index)
    image = images.saved(images.picture(1, (64, 48)), "JPEG")
    source: Any = Everywhere(train.source, image)
    dataset = Images(source, augmented=True)
    stream = SampleStream(samples=len(dataset), minibatch=Minibatch(per_worker, 8), seed=0)
    return Feed(dataset, seed=0, loaders=loaders, device=CPU, stream=stream)


def processes(given: Feed) -> list[int]:
    return [os.getpid(), *given.pids]


def shared(pid: int, address: int) -> tuple[int, int]:
    """(resident, proportional) KiB in a process of the memory that an address lies in."""
    resident = proportional = 0
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if not line.split(":")[0].isalpha() and "-" in line.split(" ")[0]:
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            inside = first <= address < last
        elif inside and line.startswith("Rss:"):
            resident += int(line.split()[1])
        elif inside and line.startswith("Pss:"):
            proportional += int(line.split()[1])
    return resident, proportional


def test_the_machine_holds_the_index_once(index: Path):
    with closing(feed(index, per_worker=8)) as given:
        batches = given.passes([range(8)], start=0, stop=60)
        for _, _ in zip(range(20), batches, strict=False):
            pass
        address = given.dataset.source.source.table.names.buffer.ctypes.data
        whole, sizes = index.stat().st_size / 1024, list[tuple[int, int]]()
        for _ in range(200):  # loaders touch pages between two looks until each has all; a copy would be in every look
            sizes = [shared(pid, address) for pid in processes(given)]
            if sum(proportional for _, proportional in sizes) < 1.05 * whole:
                break
            time.sleep(0.1)
    assert len(sizes) == 1 + LOADERS
    assert sum(resident > 0.8 * whole for resident, _ in sizes) == 1 + LOADERS  # each has looked at nearly all of it
    assert sum(proportional for _, proportional in sizes) < 1.05 * whole


def test_a_start_costs_less_than_two_seconds(index: Path):
    seconds = []
    for _ in range(3):
        started = time.process_time()
        train, validation = image_folder(index)
        seconds.append(time.process_time() - started)
        assert (len(train), len(validation)) == (SAMPLES["train"], SAMPLES["val"])
    assert min(seconds) < 2


def test_the_first_batch_at_any_iteration_costs_a_fifth_of_a_second_at_most(index: Path):
    with closing(feed(index, loaders=2)) as given:
        next(given.passes([range(1)], start=0, stop=1))  # the processes are up
        seconds = []
        for start in (1, 7_000, 99_999, 300_001, 450_000):  # each in another epoch, whose permutation it needs
            started = time.process_time()
            images_of, _ = next(given.passes([range(1)], start=start, stop=start + 1))
            seconds.append(time.process_time() - started)
            assert len(images_of) == 32
    assert min(seconds) < 0.2, seconds


def resident(pids: list[int]) -> int:
    """KiB of memory, but for files', that processes hold together; what glibc keeps of freed memory is given back."""
    ctypes.CDLL(None).malloc_trim(0)
    found = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            found += int(line.split()[1]) if line.startswith(("Pss_Anon:", "Pss_Shmem:")) else 0
    return found


@pytest.mark.slow
def test_ten_thousand_batches_grow_nothing(index: Path):
    with closing(feed(index, per_worker=1, loaders=2)) as given:
        held = []
        for number, _ in enumerate(given.passes([range(4)], start=0, stop=10_000)):
            if number in (1000, 9999):
                held.append(resident(processes(given)))
    assert held[1] <= 1.01 * held[0], held


def test_a_missing_file_of_the_index_is_one_message(index: Path):
    train, _ = image_folder(index)
    with pytest.raises(FaultError, match=r"train/n00000000/n01440764_0000000\.JPEG cannot be read: No such file"):
        train.keyed(0, 0)

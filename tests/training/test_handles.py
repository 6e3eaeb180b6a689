"""Data sets that open their file at the first item: every process that loads has a handle of its own, as with torch."""

import io
import os
import sqlite3
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import onehour

N, WIDTH = 256, 64
BYTES = 4 * WIDTH
ROWS = np.repeat(np.arange(N, dtype=np.float32)[:, None], WIDTH, 1)


class Lazy(Dataset[tuple[Tensor, int]]):
    """Row i is full of i; whatever reads another one says so."""

    handle: Any = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.handle is None:
            self.handle = self.open()
        row = np.array(self.row(index))
        assert row.shape == (WIDTH,)
        assert (row == index).all(), f"asked for {index}, got {row[0]}"
        return torch.from_numpy(row).view(1, 8, 8) / N, index % 4

    def open(self) -> Any:
        return (self.folder / "rows.bin").open("rb")

    def row(self, index: int) -> Any:
        self.handle.seek(index * BYTES)
        return np.frombuffer(self.handle.read(BYTES), np.float32)


class Unbuffered(Lazy):
    def open(self) -> Any:
        return os.open(self.folder / "rows.bin", os.O_RDONLY)

    def row(self, index: int) -> Any:
        os.lseek(self.handle, index * BYTES, os.SEEK_SET)
        return np.frombuffer(os.read(self.handle, BYTES), np.float32)


class Measured(Lazy):
    """Opens its file to say how many samples and classes it has."""

    def opened(self) -> Any:
        self.handle = self.handle or self.open()
        return self.handle

    def __len__(self) -> int:
        return self.opened().seek(0, os.SEEK_END) // BYTES

    @property
    def classes(self) -> list[str]:
        self.opened().seek(0)
        return list("abcd")


class Zip(Lazy):
    def open(self) -> Any:
        return zipfile.ZipFile(self.folder / "rows.zip")

    def row(self, index: int) -> Any:
        return np.frombuffer(self.handle.read(str(index)), np.float32)


class Npz(Lazy):
    def open(self) -> Any:
        return np.load(self.folder / "rows.npz")

    def row(self, index: int) -> Any:
        return self.handle[str(index)]


class Tar(Lazy):
    def open(self) -> Any:
        return tarfile.open(self.folder / "rows.tar")

    def row(self, index: int) -> Any:
        return np.frombuffer(self.handle.extractfile(str(index)).read(), np.float32)


class Sqlite(Lazy):
    def open(self) -> Any:
        return sqlite3.connect(self.folder / "rows.db")

    def row(self, index: int) -> Any:
        return np.frombuffer(self.handle.execute("select row from rows where id = ?", (index,)).fetchone()[0], "f4")


class Memmap(Lazy):
    def open(self) -> Any:
        return np.memmap(self.folder / "rows.bin", np.float32, "r", shape=(N, WIDTH))

    def row(self, index: int) -> Any:
        return self.handle[index]


class OneProcess(Lazy):
    """Refuses a handle of another process, and a second one of the same file in one, as LMDB does."""

    owners: set[int] = set()  # noqa: RUF012 - the class's on purpose

    def open(self) -> Any:
        assert os.getpid() not in self.owners
        self.owners.add(os.getpid())
        self.owner = os.getpid()
        return super().open()

    def row(self, index: int) -> Any:
        assert self.owner == os.getpid()
        return super().row(index)


class ReadsOn(Lazy):
    """A generator, and what it has given so far."""

    def open(self) -> Any:
        self.rows: list[np.ndarray] = []
        file = (self.folder / "rows.bin").open("rb", buffering=0)
        return iter(lambda: file.read(BYTES), b"")

    def row(self, index: int) -> Any:
        while len(self.rows) <= index:
            self.rows.append(np.frombuffer(next(self.handle), np.float32))
        return self.rows[index]


class Threads(Lazy):
    """Threads that a forked process does not have, behind a lock."""

    def open(self) -> Any:
        self.lock = threading.Lock()
        return ThreadPoolExecutor(1)

    def row(self, index: int) -> Any:
        with self.lock:
            return self.handle.submit(lambda: ROWS[index]).result()


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
KINDS = [Lazy, Unbuffered, Measured, Zip, Npz, Tar, Sqlite, Memmap, OneProcess, ReadsOn, Threads]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    ROWS.tofile(folder / "rows.bin")
    np.savez(folder / "rows.npz", **{str(i): ROWS[i] for i in range(N)})
    with zipfile.ZipFile(folder / "rows.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for i in range(N):
            zipped.writestr(str(i), ROWS[i].tobytes())
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for i in range(N):
            member = tarfile.TarInfo(str(i))
            member.size = BYTES
            tar.addfile(member, io.BytesIO(ROWS[i].tobytes()))
    database = sqlite3.connect(folder / "rows.db")
    database.execute("create table rows (id integer primary key, row blob)")
    database.executemany("insert into rows values (?, ?)", [(i, ROWS[i].tobytes()) for i in range(N)])
    database.commit()
    database.close()
    return folder


def net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 4))


SIZES: dict[str, Any] = {"minibatch": 64, "per_worker": 16, "warmup": "none", "milestones": ("1",), "classes": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_no_process_reads_another_ones_sample(kind: type[Lazy], folder: Path, tmp_path: Path):
    """Training and validation are one object, as people write it, in one case of two."""
    train = kind(folder)
    validation = train if kind in (Lazy, Zip, Tar) else kind(folder)
    options = SIZES | {"epochs": 2, "loaders": 2, "threads": 1, "device": "cpu"}
    run = onehour.train("resnet50", data=(train, validation), model=net, out=tmp_path / "run", **options)
    assert run.finished
    assert train.handle is None
    assert validation.handle is None


@pytest.mark.parametrize(("kind", "loaders"), [(Lazy, 0), (Zip, 1), (Lazy, 4)])
def test_nor_with_other_numbers_of_loaders(kind: type[Lazy], loaders: int, folder: Path, tmp_path: Path):
    options = SIZES | {"epochs": 2, "loaders": loaders, "threads": 1, "device": "cpu"}
    data = kind(folder)
    run = onehour.train("resnet50", data=(data, data), model=net, out=tmp_path / "run", **options)
    assert run.finished
    assert (data.handle is None) == (loaders > 0)

"""The power goes after any file operation: from whatever the disk then holds, the same command goes on."""

import os
import random
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from powercut import Disk, Log, laid_out

from onehour.api import train
from onehour.dist.group import Group
from onehour.training.checkpoint import Store
from onehour.training.decisions import decisions_of
from onehour.training.record import Run, finished_run
from onehour.training.recorder import RunFolder
from onehour.training.state import Network

OUT = "runs/new/run"
SEEDS = range(1)
"""Of what is left by chance, beside what is certain and all."""

STEP = 1 if "ONEHOUR_TEST_ALL" in os.environ else 3
"""Every so many operations the power goes."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names are resolved through /proc")


@pytest.fixture(scope="module")
def log(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, Run]:
    """Every operation of a run, from a folder above that is not there yet to its end."""
    root = tmp_path_factory.mktemp("power")
    log, write = Log(root), Store.write

    def written(self: Store, iteration: int, *arguments: Any) -> Path:
        path = write(self, iteration, *arguments)
        log.mark(iteration)
        return path

    with log.active(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(Store, "write", written)
        run = train(tiny.recipe(), out=root / OUT, save_every=4)
    log.mark("finished")
    return log, run


def test_the_log_misses_nothing(log: tuple[Log, Run]):
    """What the operations leave, none of them lost, is what lies on the disk."""
    seen, run = log
    root = Path(seen.root)
    lies = {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
    assert Disk(seen.operations).all() == lies
    assert run.finished


def test_a_finished_run_is_on_disk_and_so_is_all_above_it(log: tuple[Log, Run]):
    seen, _ = log
    disk = Disk(seen.operations)
    assert {name: content for name, content in disk.all().items() if "/." not in name}.items() <= disk.certain().items()


def goes_on(tree: dict[str, bytes | None], root: Path, whole: Run, tiny: ModuleType) -> int:
    """The iteration that the same command goes on from, its state and its record as they were."""
    laid_out(tree, root)
    out = root / OUT
    if (ended := finished_run(out, whole.recipe)) is not None:
        assert ended.summary["state_sha256"] == whole.summary["state_sha256"]
        assert ended.metrics == whole.metrics
        return 10**6
    console = mock.Mock()
    run = RunFolder(out, whole.recipe, Group(), console=console)
    try:
        model = tiny.net()
        progress = run.load(Network(model, decisions_of(whole.recipe).optimizer(model)), {})
        run.begin(progress, dict)
        console.warn.assert_not_called()
        done = progress.iteration if progress else 0
        known = [record for record in whole.metrics if record["iteration"] <= done]
        assert Run(out).metrics == known
        return done
    finally:
        run.close()


def test_the_same_command_goes_on_from_whatever_is_left(log: tuple[Log, Run], tiny: ModuleType, tmp_path: Path):
    seen, whole = log
    tried: set[tuple[Any, ...]] = set()
    for end in range(0, len(seen.operations) + 1, STEP):
        disk = Disk(seen.operations[:end])
        saved = max((10**6 if mark == "finished" else mark for mark in disk.marks), default=0)
        for tree in (disk.certain(), disk.all(), *(disk.some(random.Random(f"{end} {seed}")) for seed in SEEDS)):
            if (key := (saved, *tree.items())) not in tried:
                tried.add(key)
                (place := tmp_path / str(len(tried))).mkdir()
                assert goes_on(tree, place, whole, tiny) >= saved, (end, sorted(tree))
    assert len(tried) > 60 // STEP


def test_the_bits_are_those_of_an_undisturbed_run(log: tuple[Log, Run], tiny: ModuleType, tmp_path: Path):
    seen, whole = log
    draw = random.Random(0)
    for case in range(2):
        place = tmp_path / str(case)
        place.mkdir()
        laid_out(Disk(seen.operations[: draw.randrange(len(seen.operations))]).some(draw), place)
        again = train(tiny.recipe(), out=place / OUT, save_every=4)
        assert again.summary["state_sha256"] == whole.summary["state_sha256"]
        assert again.metrics == whole.metrics

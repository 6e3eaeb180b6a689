"""The sampler's examples: each sample, rate and validation, from the start and resumed, alone and on two processes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("forked")

HERE = Path(__file__).parent
EXAMPLES = sorted((HERE.parents[1] / "examples" / "frameworks").glob("*.py"))
FRAMEWORKS = [path.stem for path in EXAMPLES if path.stem.startswith("with_")]
OURS = re.compile(
    r"onehour import|MINIBATCH|SCHEDULE|sampler=|range\(sampler|split_batches|distributed_sampler|data_skip|interval"
)
"""What only a line that the rules change has."""


def start(script: str, processes: int, *arguments: str) -> None:
    """Run one of the scripts beside this file in as many processes; what it prints is shown where it fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(HERE / script), *arguments]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ)
    assert ended.returncode == 0, ended.stdout[-6000:]


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module beside this file."""
    monkeypatch.syspath_prepend(HERE)
    return lambda name: __import__(name)


@pytest.mark.parametrize(
    ("name", "processes"),
    [
        ("own_loop", 1),
        pytest.param("own_loop", 2, marks=pytest.mark.slow),
        *(pytest.param(name, p, marks=pytest.mark.frameworks) for name in FRAMEWORKS for p in (1, 2)),
    ],
)
def test_every_sample_rate_and_validation_is_right(
    name: str, processes: int, tmp_path: Path, beside: Callable[[str], ModuleType]
):
    start("drive.py", processes, name, str(tmp_path))
    judge, starts = beside("judge"), beside("drive").STARTS
    for process in range(processes):
        tapes = json.loads((tmp_path / f"tapes-{process}.json").read_text())
        assert len(tapes) == 12
        for case, (lost, resumed) in tapes.items():
            samples, save_every, last = starts[case.split(", ")[1]]
            total, went_on = judge.MINIBATCH.iterations(samples, judge.EPOCHS), last // save_every * save_every
            assert judge.begun(lost) == judge.expected(samples, 0, last, process, processes), case
            assert judge.begun(resumed) == judge.expected(samples, went_on, total, process, processes), case


SAYS: dict[str, tuple[str, str]] = {
    "accelerate_deals_whole_batches": ("right", "divides these batches among 2 processes once more"),
    "accelerate_deals_shares": ("right", "divides these batches among 2 processes once more"),
    "accelerate_splits_shares": ("right", "leave out process and processes"),
    "accelerate_splits_whole_batches": ("right", "right"),
    "accelerate_dispatches": ("right", "right"),
    "accelerate_skips_too": ("skip_first_batches would skip", "skip_first_batches would skip"),
    "accelerate_sets_an_epoch": ("right", "right"),
    "accelerate_resumes_and_counts_from_0": ("Accelerate's loader.set_epoch(epoch)", "loader.set_epoch(epoch)"),
    "lightning_replaces_the_sampler": ("right", "use_distributed_sampler=False"),
    "lightning_counts_batches_itself": ("right", "right"),
    "lightning_reloads": ("right", "right"),
    "lightning_accumulates": ("says that 8 are trained, not 16", "says that 8 are trained, not 16"),
    "transformers_skips_too": ("ignore_data_skip=True", "ignore_data_skip=True"),
    "transformers_counts_epochs": ("max_steps must be set", "max_steps must be set"),
}
"""What each function of misuse.py ends with on one process, and on two."""


@pytest.mark.frameworks
@pytest.mark.parametrize("processes", [1, 2])
def test_another_use_is_right_or_refused(processes: int, tmp_path: Path, beside: Callable[[str], ModuleType]):
    start("misuse.py", processes, str(tmp_path))
    judge = beside("judge")
    for process in range(processes):
        said: dict[str, Any] = json.loads((tmp_path / f"said-{process}.json").read_text())
        assert said.keys() == SAYS.keys()
        for name, result in said.items():
            expects = SAYS[name][processes - 1]
            if expects != "right":
                assert expects in result, name
                continue
            assert isinstance(result, list), (name, result)
            ends = [judge.MINIBATCH.iterations(125, epoch) for epoch in (1, 2, 3)]
            tape = judge.expected(125, 0, ends[-1], process, processes)
            batches = [entry[1] for entry in tape if entry[0] == "samples"]
            if name.startswith("lightning"):
                assert judge.begun(result) == [entry for entry in tape if entry[0] != "rate"], name
            elif name == "accelerate_sets_an_epoch":
                assert result == [batches[ends[0] : ends[1]], batches[ends[1] :]]
            else:
                assert result == batches[: ends[0]], name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_changes_eight_lines_at_most_and_marks_them(path: Path):
    lines = path.read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if line.endswith("  # changed")]
    assert 5 <= len(marked) <= 8
    assert [
        line for line in lines if OURS.search(line) and line not in marked and not line.startswith("torchrun")
    ] == []

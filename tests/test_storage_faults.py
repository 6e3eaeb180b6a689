"""A short version of the campaigns that kill writers, fill disks, damage checkpoints and plant hostile files."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import onehour
from campaigns import corruptions, disk, hostile, ledger, writer
from onehour.cli import main
from onehour.training.checkpoint import CHECKPOINTS
from onehour.training.record import Run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the campaigns have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path):
    case = saved = 0
    while case < 6 or saved <= 3:  # the folder goes on from kill to kill; a busy machine takes more of them
        attempt = writer.attempt(tmp_path / "run", case)
        assert attempt["said"] == ""
        case, saved = case + 1, max(saved, attempt["told"])


def test_what_a_save_promises_is_on_disk_before_its_name():
    """Every file, then the folder, then the rename, then the folder above."""
    operations = disk.operations("first")
    aside, named = [place for place, name in enumerate(operations) if name == "rename"]
    assert named == aside + 1  # there was none whose place it takes
    before, after = operations[:aside], operations[named + 1 :]
    files = before.count("create")
    assert files == 4
    assert before.count("fsync") == files + 2  # the run's folder, which is new, and the checkpoint's own
    assert before[-3:] == ("open", "fsync", "close")
    assert after[:3] == ("open", "fsync", "close")


def test_every_operation_of_a_save_may_fail():
    """Every third with one of the errors; the campaign has all of them."""
    drawn = random.Random(0)
    operations = [(name, at) for name in disk.SITUATIONS for at in range(len(disk.operations(name)))]
    assert len(operations) > 200
    for name, at in operations[::3]:
        error, lasting = drawn.choice(sorted(disk.ERRNOS)), drawn.random() < 0.5
        assert disk.faulty(name, error, lasting, at)[0] == "", (name, at, error, lasting)


def test_every_operation_of_a_report_may_fail():
    """Page, figures and tables are then all as they were, or all new."""
    said, operations = disk.reported(None, lasting=False, at=None)
    assert said == ""
    assert len(operations) > 80
    for at in range(0, len(operations), 2):
        error, lasting = sorted(disk.ERRNOS)[at % 3], at % 4 == 0
        assert disk.reported(error, lasting=lasting, at=at)[0] == "", (at, operations[at], error, lasting)


def test_a_report_on_a_full_disk_keeps_the_old_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("onehour.study.picture.FORMATS", ("svg",))
    curve = tmp_path / "a.csv"
    curve.write_text("epoch,error\n1,50\n2,40\n")
    with disk.small_disk(2**20) as place:
        if place is None:
            pytest.skip("no tmpfs may be mounted here")
        command = ["report", str(curve), "--out", str(place / "report")]
        assert main(command) == 0
        old = disk.written_files(place / "report")
        curve.write_text("epoch,error\n1,60\n2,50\n3,30\n")
        for left in (0, 4096, 12_000):
            ballast = disk.ballast(place, left)
            capsys.readouterr()
            assert main(command) == 2
            assert "cannot be written: No space left on device; what was there is as it was" in capsys.readouterr().err
            ballast.unlink()
            assert disk.written_files(place / "report") == old
        assert main(command) == 0
        assert disk.written_files(place / "report") != old


def test_a_disk_is_full():
    """A tmpfs where one may be mounted, else a limit of the size of files."""
    for case in range(6):
        assert disk.filled(case)[0] == ""


def test_a_run_on_a_full_disk_ends_with_a_warning_and_goes_on_once_there_is_room(
    alone: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["train", "digits", "--data", "tinytask:few_digits", "--classes", "10", "--minibatch", "64"]
    command += ["--epochs", "2", "--warmup", "none", "--device", "cpu", "--save-every", "4", "--out"]
    assert main([*command, str(alone / "run")]) == 0
    capsys.readouterr()
    with disk.small_disk(2**20) as place:
        if place is None:
            pytest.skip("no tmpfs may be mounted here")
        ballast = disk.ballast(place, 300_000)
        assert main([*command, str(place / "run")]) == 2
        said = capsys.readouterr()
        (warning,) = [line for line in said.out.splitlines() if line.startswith("warning") and "milestones" not in line]
        assert f"{place / 'run' / CHECKPOINTS}: No space left on device" in warning
        assert "bytes are needed" in warning
        assert "weights could not be saved" in said.err
        assert len(said.err.splitlines()) == 1
        ballast.unlink()
        assert main([*command, str(place / "run")]) == 0
        assert "resumes" in capsys.readouterr().out
        ended, full = Run(alone / "run"), Run(place / "run")
        assert full.metrics == ended.metrics
        assert full.summary["state_sha256"] == ended.summary["state_sha256"]


def take_all(place: Path) -> None:
    """Leave no byte."""
    with suppress(OSError), (place / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("frees", [True, False])
def test_a_disk_without_a_byte_stops_no_run(alone: Path, capsys: pytest.CaptureFixture[str], frees: bool):
    """Not even the record can be written: it is, before the first checkpoint that can."""
    recipe: dict[str, Any] = {"data": "tinytask:few_digits", "classes": 10, "minibatch": 64, "epochs": 3}
    recipe |= {"warmup": "none", "device": "cpu", "save_every": 4}
    whole = onehour.train("digits", **recipe, out=alone / "run")
    with disk.small_disk(2**20) as place:
        if place is None:
            pytest.skip("no tmpfs may be mounted here")
        asked: list[int] = []

        def stop() -> bool:
            asked.append(1)
            if len(asked) == 6:
                take_all(place)
            if len(asked) == 20 and frees:
                (place / "ballast").unlink()
            return False

        if frees:
            full = onehour.train("digits", **recipe, out=place / "run", stop_asked=stop)
        else:
            with pytest.raises(ValueError, match="its weights could not be saved"):
                onehour.train("digits", **recipe, out=place / "run", stop_asked=stop)
            (place / "ballast").unlink()
            full = onehour.train("digits", **recipe, out=place / "run")
        assert capsys.readouterr().out.count("No space left on device") == 1
        assert full.metrics == whole.metrics
        assert full.summary["state_sha256"] == whole.summary["state_sha256"]


def test_no_corruption_loads_a_wrong_state(tmp_path: Path):
    source = corruptions.pristine(tmp_path / "pristine")
    found = corruptions.block(range(60), source, tmp_path / "damaged")
    assert found["said"] == ""
    assert min(Counter(found["kinds"])[kind] for kind in ("fell back, and said so", "refused", "newest loaded")) >= 3


def test_hostile_files_do_nothing_and_are_one_message_each(tmp_path: Path):
    assert len(hostile.CASES) >= 40
    base = hostile.base_run(tmp_path / "base")
    drawn = sorted(hostile.CASES)[::12]
    wrong = {name: hostile.attempt(name, base, tmp_path / str(number)) for number, name in enumerate(drawn)}
    assert {name: said for name, said in wrong.items() if said} == {}


def test_what_a_command_does_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A command that runs a file, writes elsewhere and says nothing would be found out."""

    def careless(arguments: list[str]) -> int:
        (Path("..") / "outside" / "precious").write_text("gone")
        return os.system("touch executed")

    monkeypatch.setattr(hostile, "onehour", careless)
    said = hostile.attempt("pickle as .safetensors", tmp_path, tmp_path / "case")
    for what in ("executed", "left with 0, not 2", "said 0 lines", "did ['open ", "changed files elsewhere"):
        assert what in said


def test_the_ledgers_become_one_result(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    ledger.add(path, "a", 0, ok=False, said="it broke")
    ledger.add(path, "a", 0, ok=True, kind="odd")
    ledger.add(path, "a", 1, ok=False, said="it broke", kind="odd")
    ledger.add(path, "b", "x", ok=True, runs=100, failures=0, kinds={"even": 60})
    ledger.add(path, "c", 7, ok=True, seconds=[1.0, 3.0, 2.0], slowest=4.0)
    with path.open("a") as file:
        file.write('{"campaign": "half')  # a campaign was stopped
    kept = {"elsewhere": {"runs": 2, "failures": 0, "commits": ["a"]}}
    assert ledger.summarise(tmp_path, kept)["campaigns"]["elsewhere"] == kept["elsewhere"]
    found = ledger.summarise(tmp_path)
    assert (found["runs"], found["failures"]) == (103, 1)
    a, b, c = (found["campaigns"][name] for name in "abc")
    assert (a["runs"], a["failures"], a["failed"], a["seeds"]) == (2, 1, ["1: it broke"], "0-1")
    assert (b["runs"], b["kinds"], b["seeds"]) == (100, {"even": 60}, "1 named cases")
    assert (c["seeds"], c["median_s"], c["p95_s"], c["slowest"]) == ("7", 2.0, 3.0, 4.0)
    assert len(a["commits"]) == 1


def test_a_campaign_goes_on_with_what_is_missing_or_failed(alone: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []

    def cases(ok: bool) -> Iterator[tuple[str, str, Any]]:
        for name in ("a", "b", "c", "other"):
            yield "tried", name, lambda name=name: ran.append(name) or {"ok": ok or name == "a", "said": "it broke"}

    monkeypatch.setattr("sys.argv", ["tried", "--cases", "2"])
    assert ledger.run("tried", cases(ok=False)) == 1
    monkeypatch.setattr("sys.argv", ["tried"])
    assert ledger.run("tried", cases(ok=True)) == 0
    assert ran == ["a", "b", "b", "c", "other"]
    monkeypatch.setattr("sys.argv", ["tried", "--only", "other", "--minutes", "1"])
    ledger.OUT.joinpath("tried.jsonl").unlink()
    assert ledger.run("tried", cases(ok=True)) == 0
    assert ran[5:] == ["other"]

"""Hosts that are about to train something else are refused before the first iteration, with both values."""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from onehour.config import Recipe
from onehour.data.sources import complete
from onehour.training.agreement import facts_of_data, facts_of_start, refusal

HELPERS = Path(__file__).parents[1] / "helpers"
Heard = tuple[dict[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def disagreeing() -> ModuleType:
    return __import__("disagreeing")


@pytest.fixture(scope="module")
def place(
    disagreeing: ModuleType, tmp_path_factory: pytest.TempPathFactory, popen: type[subprocess.Popen[Any]]
) -> Path:
    """The folder in which two hosts have met over every case."""
    folder = tmp_path_factory.mktemp("hosts")
    ports = list[str]()
    for port in range(10_000 + os.getpid() % 200 * 100, 32_768):  # above, the kernel gives them to anyone's connections
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(str(port))
        if len(ports) == disagreeing.NUMBER:
            break
    command = [sys.executable, str(HELPERS / "disagreeing.py"), str(folder), *ports]
    with (folder / "output").open("w") as output:
        code = popen(command, stdout=output, stderr=output, env=os.environ).wait(140)
    assert code == 0, (folder / "output").read_text()[-4000:]
    return folder


@pytest.fixture(scope="module")
def heard(place: Path) -> Heard:
    """What each host heard, by case."""
    first, second = (json.loads((place / f"heard-{rank}.json").read_text()) for rank in (0, 1))
    return first, second


def test_every_disagreement_is_refused_on_both_hosts_in_the_same_words(disagreeing: ModuleType, heard: Heard):
    for case in disagreeing.ALL:
        assert heard[0][case] == heard[1][case]
        assert "process 1 (host1)" in heard[0][case], case


def test_nothing_is_trained_before(disagreeing: ModuleType, heard: Heard, place: Path):
    for case in disagreeing.ALL:
        assert not list((place / "runs" / case).glob("metrics.jsonl")), case
        assert not list((place / "runs" / case).glob("checkpoints/*")), case


def test_a_field_is_named_with_both_values(disagreeing: ModuleType, heard: Heard, tiny: ModuleType):
    for name, values in disagreeing.FIELDS.items():
        recipes = [tiny.recipe(**({} if value == "not given" else {name: value})) for value in values]
        facts = [facts_of_start(recipe, torch.device("cpu"), []) for recipe in recipes]
        hosts = [{"host": f"host{rank}", "facts": each, "failed": None} for rank, each in enumerate(facts)]
        one, two = (list(value) if isinstance(value, tuple) else value for value in values)
        said = f"{name} is {one} on process 0 (host0) and {two} on process 1 (host1)"
        assert said in refusal(hosts)[0]
        assert name not in disagreeing.MET or said in heard[0][f"field_{name}"]


def test_other_differences_are_named_with_both_values(disagreeing: ModuleType, heard: Heard):
    for name, (_, parts) in disagreeing.CASES.items():
        for part in parts:
            assert part in heard[0][name], name


def test_processes_that_agree_train_to_the_end(heard: Heard):
    for case in ("alike", "alike, finished", "augmented"):
        assert [each[case] for each in heard] == ["trained"] * 2, case


def test_a_finished_folder_hides_no_disagreement(heard: Heard):
    assert "seed is 0 on process 0 (host0) and 7 on process 1 (host1)" in heard[0]["finished"]
    assert heard[0]["finished"] == heard[1]["finished"]


def test_images_that_no_key_decides_are_not_compared(heard: Heard):
    assert [each["by chance"] for each in heard] == ["trained"] * 2


def test_versions_may_differ_where_all_processes_allow_it_and_nothing_else(heard: Heard, place: Path):
    assert [each["allowed"] for each in heard] == ["trained"] * 2
    assert (place / "output").read_text().count("warning: as allowed, the version of torch is") == 1
    assert "--allow-different versions" in heard[1]["allowed by one"]
    assert "seed is 0" in heard[0]["more than versions"]
    assert "torch" not in heard[0]["more than versions"]


def trained(tmp_path: Path, tiny: ModuleType, *arguments: list[str]) -> list[tuple[int, str]]:
    """Exit code and error output of `onehour train` on two hosts, each in a folder of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    started = []
    for rank, own in enumerate(arguments):
        home = tmp_path / f"host-{rank}"
        home.mkdir(exist_ok=True)
        environ = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": "0", "PYTHONPATH": str(HELPERS)}
        command = [sys.executable, "-m", "onehour", "train", *own, *tiny.FLAGS, "--out", str(tmp_path / "run")]
        started.append(subprocess.Popen(command, cwd=home, env=environ, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300)[1] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


@pytest.mark.usefixtures("forked")
def test_a_flag_that_differs_is_one_message_and_code_2_on_both_hosts(tmp_path: Path, tiny: ModuleType):
    ends = trained(tmp_path, tiny, ["digits"], ["digits", "--weight-decay", "0.5", "--allow-different", "versions"])
    for code, said in ends:
        assert code == 2
        assert said.startswith("onehour: the processes do not train the same: weight_decay is 0.0001 on process 0 (")
        assert said.count("\n") == 1
        assert " and 0.5 on process 1 (" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("forked")
def test_a_host_without_the_recipes_file_keeps_no_other_waiting(tmp_path: Path, tiny: ModuleType):
    (tmp_path / "host-0").mkdir()
    (tmp_path / "host-0" / "mine.toml").write_text(tiny.recipe().to_toml())
    ends = trained(tmp_path, tiny, ["mine.toml"], ["mine.toml"])
    for code, said in ends:
        assert code == 2
        assert "process 1 (" in said
        assert "cannot train: " in said
        assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_names_of_classes_may_be_of_any_bytes(tmp_path: Path):
    images: Any = __import__("images")
    tree = images.tree(tmp_path / "data", classes=("cat", "dog\udcff"))
    recipe, data = complete(Recipe(data=str(tree), minibatch=4, per_worker=4))
    assert "the digest of all training labels" in facts_of_data(recipe, data)["samples"]

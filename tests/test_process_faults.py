"""The campaigns on processes in short: a kill, signals, a restart, jobs together, command lines."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

FAULTS = Path(__file__).parent / "faults"


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """A campaign's module, in a folder of its own; the modules beside it have names that others may have too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(FAULTS), *sys.path])
    for name in [path.stem for path in FAULTS.glob("*.py")]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(request.param)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("campaign", ["kills"], indirect=True)
def test_a_run_that_is_killed_goes_on_and_ends_as_if_nothing_had_been(
    campaign: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(campaign, "LENGTH", ("--epochs", "1", "--save-every", "4"))
    found = campaign.disturbed(campaign.SCENARIOS[2], 0)
    assert found["ok"], found
    assert sum(found["kinds"].values()) == 1
    assert len(found["codes"]) == 2 or "loader or helper" in found["kinds"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("campaign", ["signals"], indirect=True)
def test_a_run_that_is_signalled_stops_goes_on_and_ends_as_if_nothing_had_been(campaign: ModuleType):
    found = campaign.disturbed(0, epochs=1, each=1)
    assert found["ok"], found
    assert found["runs"] == 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", [3, 4, 12, 0], ids=["plan", "report", "doctor", "train"])
@pytest.mark.parametrize("campaign", ["interrupts"], indirect=True)
def test_a_command_that_is_interrupted_while_it_imports_says_one_line(campaign: ModuleType, case: int):
    found = campaign.interrupted(case, span=0.3)
    assert found["ok"], found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("campaign", ["restarts"], indirect=True)
def test_a_killed_process_is_back_and_takes_a_step(campaign: ModuleType):
    found = campaign.restarted(0, kills=1)
    assert found["ok"], found
    assert found["kills"][0]["started"] < found["kills"][0]["seconds"]


@pytest.mark.timeout(300)
@pytest.mark.slow
@pytest.mark.parametrize("campaign", ["together"], indirect=True)
def test_jobs_on_one_host_do_not_meet(campaign: ModuleType):
    found = campaign.together(0, jobs=3)
    assert found["ok"], found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("campaign", ["cli"], indirect=True)
def test_no_command_line_and_no_recipe_file_ends_in_a_traceback(campaign: ModuleType):
    with campaign.furnished() as folder:
        found = campaign.block(range(500), folder)
    assert found["ok"], found["said"]


@pytest.mark.slow  # two minutes of waiting
@pytest.mark.timeout(600)
@pytest.mark.parametrize("campaign", ["soak"], indirect=True)
def test_nothing_grows_while_processes_are_killed(campaign: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", "")  # so that what the campaign sets is put back
    found = campaign.soaked(0, minutes=2.0, every=20.0)
    assert found["ok"], found
    assert found["runs"] >= 4

"""Cores are those of the CPU set and the cgroup's quota, divided once."""

from pathlib import Path

import pytest

from onehour.machine import cores, own_share, share_of, which_cores


@pytest.fixture(autouse=True)
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU set of 16."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    monkeypatch.delenv("ONEHOUR_CORES", raising=False)


def counted(tmp_path: Path, groups: str, files: dict[str, str]) -> int:
    """Cores under a cgroup tree of these files."""
    (tmp_path / "cgroup").write_text(groups)
    for name, content in files.items():
        place = tmp_path / "mount" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
    return cores(tmp_path / "cgroup", tmp_path / "mount")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 16),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "900000 100000\n"}, 3),
        ("0::/a\n", {"a/cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 16),
        ("0::/outside/of/the/container\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/../..\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "nonsense\n"}, 16),
        ("0::/\n", {}, 16),
        ("1:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "500000\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 5),
        ("1:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 16),
        (
            "4:memory:/x\n3:cpu,cpuacct:/docker/17\n0::/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "150000\n", "cpu,cpuacct/cpu.cfs_period_us": "50000\n"},
            3,
        ),
        ("3:cpuset:/a\n", {"cpuset/a/cpu.cfs_quota_us": "1\n", "cpuset/a/cpu.cfs_period_us": "1\n"}, 16),
        ("", {}, 16),
    ],
)
def test_a_quota_of_either_version_counts_wherever_above_it_stands(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
):
    assert counted(tmp_path, groups, files) == expected


def test_without_cgroups_the_cpu_set_counts(tmp_path: Path):
    assert cores(tmp_path / "none", tmp_path) == 16


def test_shares_are_of_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("onehour.machine._quotas", lambda *_: [])
    assert [share_of(processes) for processes in (1, 3, 16, 40)] == [16, 5, 1, 1]
    assert own_share(4) == 4


def test_what_a_parent_gave_is_not_divided_again_but_among_its_own_children(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ONEHOUR_CORES", "8")
    assert (cores(), own_share(4), share_of(4)) == (8, 8, 2)
    monkeypatch.setenv("ONEHOUR_CORES", "64")
    assert cores() <= 16


def test_each_core_has_a_bit_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 3, 130})
    assert which_cores() == 1 + 8 + 2**130

"""A sweep that nothing trained, and what it shows."""

from pathlib import Path

import pytest
import studies

from onehour.study.findings import Findings, findings_of
from onehour.study.results import Study, read_study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Five seeds, every minibatch and arm of tests/helpers/studies.py; two runs left the finite numbers."""
    path: Path = tmp_path_factory.mktemp("study") / "sweep"
    studies.write_sweep(path)
    return read_study([path])


@pytest.fixture(scope="session")
def findings(study: Study) -> Findings:
    return findings_of(study)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as SVG files alone, where a test is of something else."""
    monkeypatch.setattr("onehour.study.picture.FORMATS", ("svg",))

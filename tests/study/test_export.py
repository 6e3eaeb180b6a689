"""results.json and results.csv say what the entries say, and hold nothing that JSON does not."""

import csv
import importlib
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from onehour.study.export import results_csv, results_json
from onehour.study.others import read_paths
from onehour.study.results import read_study
from onehour.study.tables import Findings, findings_of

studies = importlib.import_module("studies")


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    path = tmp_path_factory.mktemp("export") / "sweep"
    studies.write_sweep(path, arms=studies.table_arms(studies.BASE), unfinished=["128-s4"])
    return findings_of(read_study([path]))


@pytest.fixture(scope="module")
def content(findings: Findings) -> dict[str, Any]:
    return json.loads(results_json(findings, ("a-figure",), "1.2.3"), parse_constant=pytest.fail)


def test_entries_are_the_studys(findings: Findings, content: dict[str, Any]):
    assert len(content["entries"]) == len(findings.study.entries)
    by_key = {(entry["arm"], entry["minibatch"]): entry for entry in content["entries"]}
    for entry in findings.study.entries:
        found = by_key[entry.label, entry.minibatch]
        assert (found["n"], found["mean"], found["std"]) == (entry.n, entry.mean, entry.std)
        errors = [run["error"] for run in found["runs"] if run["error"] is not None]
        assert errors == list(entry.errors)
        assert found["mean"] == statistics.fmean(errors)
        assert [len(run["curve"]) for run in found["runs"]] == [len(result.curve) for result in entry.results]


def test_verdicts_and_where_they_come_from(findings: Findings, content: dict[str, Any]):
    states = {entry["minibatch"]: entry["verdict"] for entry in content["entries"] if not entry["arm"]}
    assert (states[32], states[512], states[1024], states[2048]) == ("reference", "holds", "worse", "untested")
    assert (content["margin"], content["reference"], content["figures"]) == (0.5, 32, ["a-figure"])
    assert content["written_by"] == "1.2.3"
    assert [sentence["state"] for sentence in content["verdict"]] == ["holds", "worse"]
    arm = next(entry for entry in content["entries"] if entry["arm"] == "warmup=none")
    assert (arm["group"], arm["name"], arm["family"]) == ("rate", "no warmup", 6)
    assert arm["paper_difference"] == pytest.approx(1.1)


def test_what_is_not_known_is_null(tmp_path: Path):
    studies.write_sweep(tmp_path, seeds=1, minibatches=(32, 64), arms=(), unfinished=["64-s0"])
    content = json.loads(results_json(findings_of(read_study([tmp_path]))), parse_constant=pytest.fail)
    first, second = content["entries"]
    assert (first["std"], first["upper"], second["mean"], second["runs"][0]["error"]) == (None, None, None, None)


def test_a_line_a_run(findings: Findings):
    lines = list(csv.DictReader(io.StringIO(results_csv(findings))))
    results = [(entry, result) for entry in findings.study.entries for result in entry.results]
    assert len(lines) == len(results)
    found = {line["source"]: line for line in lines}
    for entry, result in results:
        line = found[f"cells/{Path(result.source).name}"]
        assert line["arm"] == entry.label
        assert line["error"] == ("" if result.error is None else str(result.error))
        assert (int(line["minibatch"]), int(line["seed"])) == (entry.minibatch, result.seed)
    assert found["cells/512-s0"]["workers"] == "32"
    assert found["cells/scaling=fixed-512-s0"]["target_lr"] == "0.2"
    assert found["cells/128-s4"]["outcome"] == "unfinished"


def test_no_place_of_this_machine_is_told(findings: Findings, tmp_path: Path):
    source = findings.study.entries[0].results[0].source
    for text in (results_json(findings), results_csv(findings)):
        assert str(Path(source).parent) not in text


def test_others_curves_are_kept(tmp_path: Path):
    findings = findings_of(read_paths([studies.write_csv(tmp_path / "mine.csv", [9, 8.5])]))
    content = json.loads(results_json(findings))
    assert content["curves"][0]["label"] == "curve=mine"
    assert content["curves"][0]["runs"][0]["curve"] == [[1, 9, None], [2, 8.5, None]]
    assert "curve=mine,,,,,,finished,8.75,,1,mine.csv" in results_csv(findings)


FORMULAS = (
    "=1+1",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "a;=1",
    "a,@b",
    "a|=1",
    "＝1",
    '"=1',
    " =1",
    "=cmd|' /C calc'!A1",
)


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_is_a_formula_however_a_spreadsheet_divides_the_line(tmp_path: Path, text: str):
    """Delimiters and quotes as Excel and LibreOffice take them in one country or another."""
    paths = [tmp_path / f"{text.replace('/', '_')}{n}.csv" for n in range(2)]
    for path in paths:
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("epoch", "error", "minibatch", "arm"), (1, 9, 64, f"{text}{path.stem[-1]}")])
    written = results_csv(findings_of(read_paths(paths)))
    assert written.count("'") >= 2
    for delimiter in ",;\t|":
        for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
            for row in csv.reader(io.StringIO(written), delimiter=delimiter, quoting=quoting):
                assert not [cell for cell in row if cell.lstrip()[:1] in tuple("=+-@＝")]
                assert all(cell.isprintable() for cell in row)

"""The report as a whole: one page that asks for nothing, figures and data beside it, the same bytes twice."""

import csv
import io
import json
import re
import statistics
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import studies

from onehour.cli import main
from onehour.study.curves import curve_pictures
from onehour.study.findings import Findings, findings_of
from onehour.study.picture import FORMATS, VARIABLES, Picture
from onehour.study.report import WrittenReport, render, results_csv, results_json, write_report
from onehour.study.results import read_paths
from onehour.study.verdict import points
from onehour.study.wording import error_text, headline

VOID = {"meta", "br", "link", "img", "hr", "path", "use", "rect"}
FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a;=1", "a,@b", "a|=1", "＝1", '"=1', " =1")
FORMULAS += ("=cmd|' /C calc'!A1",)


class Page(HTMLParser):
    """A page as a browser's parser sees it: tags that fit, attributes, and text by the tag that it is in."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.text.append(" " * (tag in ("td", "dd", "dt")))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.text.append(data)

    @property
    def words(self) -> str:
        """All of its text, on one line."""
        return " ".join("".join(self.text).replace("\u00a0", " ").split())

    def values(self, name: str, tag: str = "") -> list[str]:
        """What an attribute holds, wherever it is."""
        return [value for where, found, value in self.attributes if found == name and tag in ("", where)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[WrittenReport, list[Picture]]:
    """A report, with its figures as SVG files alone, and these figures."""
    path = tmp_path_factory.mktemp("report") / "sweep"
    studies.write_sweep(path, left_out=["zero_gamma=false-512-s4"], unfinished=["128-s4"], together=5)
    pictures: list[Picture] = []

    def noted(findings: Findings) -> tuple[str, list[Picture]]:
        page, drawn = render(findings)
        pictures.extend(drawn)
        return page, drawn

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("onehour.study.picture.FORMATS", ("svg",))
        patched.setattr("onehour.study.report.render", noted)
        return write_report([path]), pictures


@pytest.fixture(scope="module")
def report(written: tuple[WrittenReport, list[Picture]]) -> WrittenReport:
    return written[0]


@pytest.fixture(scope="module")
def page(report: WrittenReport) -> Page:
    return Page(report.page)


def test_what_lies_in_the_folder(report: WrittenReport):
    folder = report.page.parent
    names = {path.name for path in folder.iterdir()}
    assert names == {"cells", "sweep.toml", "report.html", "results.json", "results.csv", "figures"}
    figures = sorted(path.name for path in (folder / "figures").iterdir())
    expected = [
        *("arms-at-512", "curves", "curves-of-arms-at-512", "error-against-minibatch", "error-against-time"),
        "per-worker-at-512",
    ]
    assert figures == sorted(f"{name}.svg" for name in expected)
    assert all((folder / "figures" / name).stat().st_size > 5000 for name in figures)
    assert sorted(json.loads(report.results.read_text())["figures"]) == expected


def test_one_page_that_asks_for_nothing(report: WrittenReport, page: Page):
    text = report.page.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_000_000
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "form", "base"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name == "src" or name.startswith("on")]
    assert not [value for value in page.values("href") if not value.startswith("#")]
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = [value for value in page.values("content", "meta") if "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_figure_is_there_with_title_caption_and_text_alternative(
    written: tuple[WrittenReport, list[Picture]], page: Page
):
    _, pictures = written
    assert len(pictures) == 6
    assert page.values("aria-label", "svg") == [f"{p.title}. {p.caption}" for p in pictures for _ in range(2)]
    assert page.values("role", "svg") == ["img"] * 12
    for number, picture in enumerate(pictures, 1):
        assert f"Figure {number}. {picture.title}. {picture.caption}" in page.words
        assert re.search(r"\d", picture.caption)
        assert all(note in page.words for note in picture.notes)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.values("href")} <= set(ids)


def test_inline_figures_share_no_id_and_name_nothing_outside(report: WrittenReport):
    text = report.page.read_text(encoding="utf-8")
    seen: set[str] = set()
    for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(figure)
        ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert len(ids) == len(set(ids))
        assert not seen & set(ids)
        seen |= set(ids)
        assert set(re.findall(r"(?:url\(|href=.)#([\w.-]+)", figure)) == set(ids)
        assert not {element.tag for element in root.iter()} & {"image", "style", "script", "foreignObject"}
        assert all(name not in ("style", "onload") for element in root.iter() for name in element.attrib)
    styles = " ".join(re.findall(r"^\.s\d+ \{ (.*) \}$", text, re.MULTILINE))
    assert not re.search(r"#[0-9a-f]{6}", styles)  # every colour follows light and dark
    assert {f"var(--{name})" for name in VARIABLES.values()} & set(re.findall(r"var\(--\w+\)", styles))


def test_the_verdict_comes_first(report: WrittenReport, page: Page):
    text = page.words
    places = [text.index(sentence.text) for sentence in headline(report.findings)]
    for title in ("Error against minibatch", "What each change costs", "BatchNorm’s n", "Curves", "What it ran on"):
        places.append(text.index(title, places[-1]))
    assert places == sorted(places)
    assert text.index("Train at minibatch 512 (16×) or below") == places[0]
    assert "judged alone, by the 90 % interval of its points above what it is compared with" in text


@pytest.mark.usefixtures("quick")
def test_the_noise_of_runs_at_the_base_is_said_and_drawn(tmp_path: Path):
    points = [[10.0 * number, 20.0 + number % 3, 0.05 + 0.01 * (number % 2)] for number in range(12)]
    for minibatch, error in ((32, 3.6), (256, 3.6), (512, 4.5)):
        recipe = studies.BASE.replace(minibatch=minibatch)
        studies.write_run(tmp_path / str(minibatch), recipe, error, noise=points if minibatch == 32 else ())
    report = write_report([tmp_path / "32", tmp_path / "256", tmp_path / "512"], tmp_path / "out")
    words = Page(report.page).words
    assert "the linear rule should hold to minibatch 256 (8×)" in words
    assert "382 samples (95 %: 358 to 408), from 12 points" in words
    assert json.loads(report.results.read_text(encoding="utf-8"))["advice"]["holds_to"] == 256
    assert "noise scale" in (tmp_path / "out/figures/error-against-minibatch.svg").read_text(encoding="utf-8")


def test_the_tables_numbers_are_the_entries(report: WrittenReport, page: Page):
    for row in report.findings.sizes:
        assert error_text(row.entry.mean, row.entry.std) in page.words
    for row in report.findings.arms:
        assert re.search(
            rf"{re.escape(row.name)} {row.broke} of {row.entry.n} \([^)]+\) "
            rf"{re.escape(error_text(row.entry.mean, row.entry.std))}",
            page.words,
        ), row.name
        assert points(row.cost) in page.words
    for text in (
        "Points and their interval are of the same seeds with and without the change.",
        "the recipe 0 of 5 (≤ 45 %) 3.70 ± 0.15",
        "32 (1×) 2 0.2 0 of 5 (≤ 45 %) 3.60 ± 0.15 reference",
        "2k (64×) 128 12.8 5 of 5 (55 to 100 %) 74.92 ± 15.00 ✕2 +71.32 broke",
        "no warmup 0 of 5 (≤ 45 %) 4.60 ± 0.15 +0.90 [+0.80, +1.00] +1.10 beyond",
        "the rate scaled by √k 0 of 5 (≤ 45 %) 4.05 ± 0.15 +0.35 [+0.10, +0.60] +2.48 above (6 more seeds)",
        "512 (16×) 14.5 s ± 0 % 3.59 3.70 ± 0.15 +0.10",
    ):
        assert text in page.words, text


def test_what_it_ran_on_and_how_to_run_it_again(page: Page):
    assert "torch 2.13.0+cpu" in page.words
    assert "seeds 0 to 4" in page.words
    assert (
        "onehour sweep digits --minibatch 32,64,128,256,512,1024,2048 --seeds 5 --reference-seeds 5 --arm" in page.words
    )
    assert 'milestones = ["8", "16", "64/3"]' in page.words
    assert "2 runs have not ended, and are not counted: 128-s4, zero_gamma=false-512-s4." in page.words
    assert "5 seeds were trained at once, as one network" in page.words


def test_the_same_results_give_the_same_bytes(tmp_path: Path):
    studies.write_sweep(tmp_path / "sweep", seeds=2, minibatches=(32,), arms=())
    first, second = (write_report([tmp_path / "sweep"], tmp_path / name).page.parent for name in "ab")
    assert {path.suffix for path in (first / "figures").iterdir()} == {f".{kind}" for kind in FORMATS}
    for path in sorted(first.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name


@pytest.mark.usefixtures("quick")
def test_an_old_report_is_replaced_with_its_figures(tmp_path: Path):
    paths = [studies.write_run(tmp_path / str(k), studies.BASE.replace(minibatch=k), 3.5) for k in (32, 64)]
    out = tmp_path / "out"
    write_report(paths, out)
    assert (out / "figures" / "error-against-time.svg").exists()
    write_report(paths[:1], out)
    assert not (out / "figures" / "error-against-time.svg").exists()
    assert (out / "figures" / "error-against-minibatch.svg").exists()
    (out / "results.json").write_text('{"format": "onehour report 1", "fig')  # an earlier version's, cut
    write_report(paths[:1], out)
    assert json.loads((out / "results.json").read_text())["entries"]


@pytest.mark.parametrize("name", ["report.html", "results.json", "results.csv"])
def test_nobody_elses_file_is_overwritten(tmp_path: Path, name: str):
    (tmp_path / name).write_text("mine")
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    with pytest.raises(ValueError, match=f"{name} was not written by a report and would be overwritten; choose ano"):
        write_report([run], tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {name, "run"}


@pytest.mark.usefixtures("quick")
def test_outside_text_is_escaped_everywhere(tmp_path: Path):
    name = "<script>alert('1')</script> & $x_1$"
    recipe = studies.BASE.replace(name=name, data="<img src=x onerror=alert(1)>", model="</style><b>]]>{{ 7 * 7 }}")
    spec = studies.write_sweep(tmp_path / "sweep", recipe=recipe, seeds=1, minibatches=(32, 64), arms=())
    environment = {"gpu": "<script>alert(2)</script>", "<b>": "</dd><script>"}
    path = tmp_path / "sweep" / "cells" / next(spec.cells()).name / "environment.json"
    path.write_text(json.dumps({"sessions": [environment]}))
    others = [
        studies.write_csv(tmp_path / "<script>3.csv", [9, 8]),
        studies.write_csv(tmp_path / "c.csv", [9, 8] * 12, minibatch=64, arm="<script>4"),
    ]
    report = write_report([tmp_path / "sweep", *others], tmp_path / "out")
    page = Page(report.page)
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("b") == page.tags.count("figcaption")
    outside = ("<script>alert(2)</script>", "</dd><script>", "<script>3", "<script>4", "onerror=alert(1)")
    for text in (name, f"{name[:23]}…", "]]>{{ 7 * 7 }}", *outside):  # in a figure it is cut
        assert text in page.words, text


@pytest.mark.usefixtures("quick")
def test_a_recipe_without_a_name_comes_with_its_file(tmp_path: Path):
    recipe = studies.BASE.replace(name="mine")
    studies.write_sweep(tmp_path, recipe=recipe, seeds=1, minibatches=(32,), arms=())
    write_report([tmp_path])
    assert (tmp_path / "base-recipe.toml").read_text(encoding="utf-8") == recipe.to_toml()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("epochs", "last"), [((1, 2, 3), "epochs"), ((0.5, 1, 1.5), "evaluations"), ((5, 10, 15), "evaluations")]
)
def test_curves_alone_make_a_report(tmp_path: Path, epochs: tuple[float, ...], last: str):
    paths = [tmp_path / f"{name}.csv" for name in "ab"]
    for path in paths:
        path.write_text("epoch,error\n" + "".join(f"{epoch},9\n" for epoch in epochs), encoding="utf-8")
    report = write_report(paths)
    assert report.page.parent == tmp_path / "report"
    page = Page(report.page)
    assert "without it there is nothing to judge" in page.words
    assert page.tags.count("svg") == 2
    assert "The CSVs do not say." in page.words
    assert f"the median of its last five {last};" in page.words


@pytest.mark.usefixtures("quick")
def test_one_seed_is_said(tmp_path: Path):
    studies.write_sweep(tmp_path, seeds=1, minibatches=(32, 64), arms=())
    page = Page(write_report([tmp_path]).page)
    assert "there is no verdict: one seed has no std; train at least 2." in page.words
    assert "One seed has no std, so none is given." in page.words
    assert "nan" not in page.words
    assert f"--seeds 5 --arm none --out {tmp_path}" in page.words


def test_curves_of_many_long_runs_stay_small(tmp_path: Path):
    recipe = studies.BASE.replace(epochs=300, milestones=("100", "200"))
    studies.write_sweep(tmp_path, recipe=recipe, seeds=2, arms=())
    (picture,) = curve_pictures(findings_of(read_paths([tmp_path])))
    assert len(picture.inline("wide", {}).encode()) < 150_000


@pytest.mark.usefixtures("quick")
def test_the_command_prints_the_verdict_and_what_would_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    studies.write_sweep(tmp_path / "sweep", seeds=5, minibatches=(32, 64, 1024), arms=())
    assert main(["report", str(tmp_path / "sweep"), "--margin", "0.7"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Train at minibatch 64 (2×) or below: up to there the error stays within 0.7 points")
    assert said[1].startswith("At 1k (32×) 4 of 5 runs broke")
    assert said[-1] == f"report  {tmp_path / 'sweep' / 'report.html'}"
    assert main(["report", str(tmp_path / "sweep"), "--json", "--out", str(tmp_path / "out")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    studies.write_sweep(tmp_path / "one", seeds=1, minibatches=(32, 64), arms=())
    assert main(["report", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("  onehour sweep digits --minibatch 32,64 --seeds 5")


@pytest.mark.parametrize(
    ("name", "content", "arguments"),
    [
        ("sweep/cells/32-s1/metrics.jsonl", b'{"recipe"', ["sweep"]),
        ("sweep/sweep.toml", b"minibatches = [32]\nsead = 1", ["sweep"]),
        ("a.csv", b"\xff\xfe\x00", ["a.csv"]),
        ("a.csv", b"epoch,error\n1,9\n", ["sweep/cells"]),
        ("a.csv", b"epoch,error\n1,9\n", ["sweep", "--margin", "-1"]),
    ],
    ids=["cut", "edited", "no csv", "no sweep", "margin"],
)
def test_bad_input_is_one_message_and_exit_2_and_nothing_is_lost(
    alone: Path, refused: Any, name: str, content: bytes, arguments: list[str]
):
    studies.write_sweep(alone / "sweep", seeds=2, minibatches=(32,), arms=())
    (alone / name).write_bytes(content)
    before = {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()}
    assert refused(["report", *arguments])
    assert {path: path.read_bytes() for path in alone.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"a report needs {name}: pip install 'onehour\[report\]'"):
        write_report([run])
    assert not (tmp_path / "report").exists()


def test_the_data_are_the_studys_entries(findings: Findings):
    content: dict[str, Any] = json.loads(results_json(findings, ["a-figure"], "1.2.3"), parse_constant=pytest.fail)
    assert len(content["entries"]) == len(findings.study.entries)
    by_key = {(entry["arm"], entry["minibatch"]): entry for entry in content["entries"]}
    for entry in findings.study.entries:
        found = by_key[entry.label, entry.minibatch]
        assert (found["n"], found["mean"], found["std"]) == (entry.n, entry.mean, entry.std)
        errors = [run["error"] for run in found["runs"] if run["error"] is not None]
        assert errors == list(entry.errors)
        assert found["mean"] == statistics.fmean(errors)
        assert [len(run["curve"]) for run in found["runs"]] == [len(result.curve) for result in entry.results]
    states = [by_key["", size]["verdict"] for size in (32, 512, 1024, 2048)]
    assert states == ["reference", "within", "broke", "broke"]
    assert (content["format"], content["looks"]) == ("onehour report 2", 1)
    assert (content["margin"], content["reference"], content["figures"]) == (0.5, 32, ["a-figure"])
    assert content["written_by"] == "1.2.3"
    assert [sentence["state"] for sentence in content["verdict"]] == ["within", "broke"]
    arm = by_key["warmup=none", 512]
    assert (arm["group"], arm["name"], arm["paired"], arm["broke"]) == ("rate", "no warmup", True, 0)
    assert arm["lower"] < arm["difference"] < arm["upper"]
    assert arm["paper_difference"] == pytest.approx(1.1)


def test_what_is_not_known_is_null(tmp_path: Path):
    studies.write_sweep(tmp_path, seeds=1, minibatches=(32, 64), arms=(), unfinished=["64-s0"])
    content = json.loads(results_json(findings_of(read_paths([tmp_path]))), parse_constant=pytest.fail)
    first, second = content["entries"]
    assert (first["std"], first["upper"], second["mean"], second["runs"][0]["error"]) == (None, None, None, None)


def test_a_line_a_run(report: WrittenReport):
    text = results_csv(report.findings)
    lines = {line["source"]: line for line in csv.DictReader(io.StringIO(text))}
    study = report.findings.study
    assert len(lines) == len(study.results) == len(text.splitlines()) - 1
    for entry in study.entries:
        for result in entry.results:
            line = lines[f"cells/{Path(result.source).name}"]
            assert line["arm"] == entry.label
            assert line["error"] == ("" if result.error is None else str(result.error))
            assert (int(line["minibatch"]), int(line["seed"])) == (entry.minibatch, result.seed)
    assert lines["cells/512-s0"]["workers"] == "32"
    assert lines["cells/scaling=fixed-512-s0"]["target_lr"] == "0.2"
    assert lines["cells/128-s4"]["outcome"] == "unfinished"
    folder = str(Path(study.results[0].source).parent)
    assert folder not in text + report.results.read_text(encoding="utf-8")  # no place of this machine is told


def test_others_curves_are_kept(tmp_path: Path):
    findings = findings_of(read_paths([studies.write_csv(tmp_path / "mine.csv", [9, 8.5])]))
    (curve,) = json.loads(results_json(findings))["curves"]
    assert (curve["label"], curve["runs"][0]["curve"]) == ("curve=mine", [[1, 9, None], [2, 8.5, None]])
    assert "curve=mine,,,,,,finished,8.75,,1,mine.csv" in results_csv(findings)


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

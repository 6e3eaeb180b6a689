"""The report as a whole: one page that asks for nothing, figures and data beside it, the same bytes twice."""

import importlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from onehour.cli import main
from onehour.study.charts.picture import FORMATS
from onehour.study.others import read_paths
from onehour.study.report import Report, folder_for, render, write_report
from onehour.study.tables import findings_of
from onehour.study.text import error_text, points
from onehour.study.wording import headline

studies = importlib.import_module("studies")
VOID = {"meta", "br", "link", "img", "hr", "path", "use", "rect"}


class Page(HTMLParser):
    """A page as a browser's parser sees it: tags that fit, attributes, and text by the tag that it is in."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
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


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("report") / "sweep"
    studies.write_sweep(path, left_out=["zero_gamma=false-512-s4"], unfinished=["128-s4"], together=5)
    return write_report([path])


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(report.page.read_text(encoding="utf-8"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as SVG files alone, where a test is of something else."""
    monkeypatch.setattr("onehour.study.charts.picture.FORMATS", ("svg",))


def test_what_lies_in_the_folder(report: Report):
    names = {path.name for path in report.folder.iterdir()}
    assert names == {"cells", "sweep.toml", "report.html", "results.json", "results.csv", "figures"}
    figures = sorted(path.name for path in (report.folder / "figures").iterdir())
    expected = [
        *("arms-at-512", "curves", "curves-of-arms-at-512", "error-against-minibatch", "error-against-time"),
        "per-worker-at-512",
    ]
    assert figures == sorted(f"{name}.{kind}" for name in expected for kind in FORMATS)
    assert all((report.folder / "figures" / name).stat().st_size > 5000 for name in figures)
    assert sorted(json.loads(report.results.read_text())["figures"]) == expected


def test_one_page_that_asks_for_nothing(report: Report, page: Page):
    assert report.page.stat().st_size < 1_000_000
    assert not {"script", "link", "img", "iframe", "object", "embed", "image", "form", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert name != "src", tag
        assert not name.startswith("on"), tag
        assert name != "href" or value.startswith("#"), value
    style = report.page.read_text(encoding="utf-8").partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = [value for tag, _, value in page.attributes if tag == "meta" and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_figure_is_there_with_title_caption_and_text_alternative(report: Report, page: Page):
    _, pictures = render(report.findings)
    assert len(pictures) == 6
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == [f"{picture.title}. {picture.caption}" for picture in pictures for _ in range(2)]
    assert [value for tag, name, value in page.attributes if (tag, name) == ("svg", "role")] == ["img"] * 12
    for number, picture in enumerate(pictures, 1):
        assert f"Figure {number}. {picture.title}. {picture.caption}" in page.words
        assert re.search(r"\d", picture.caption)
        assert all(note in page.words for note in picture.notes)


def test_ids_are_unique_and_what_is_named_is_there(page: Page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    named = [value[1:] for _, name, value in page.attributes if name == "href"]
    named += [value[5:-1] for _, name, value in page.attributes if name == "clip-path"]
    assert set(named) <= set(ids)


def test_the_verdict_comes_first(report: Report, page: Page):
    text = page.words
    places = [text.index(sentence.text) for sentence in headline(report.findings)]
    order = ["Error against minibatch Figure", "What each change costs", "BatchNorm’s n", "Curves", "What it ran on"]
    places += [text.index(title.split(" Figure")[0], places[-1]) for title in order]
    assert places == sorted(places)
    assert "less than 0.5 points above the reference’s with 95 % confidence" in text


def test_the_tables_numbers_are_the_entries(report: Report, page: Page):
    for row in report.findings.sizes:
        assert error_text(row.entry.mean, row.entry.std) in page.words
    for row in report.findings.arms:
        line = f"{row.name} {row.entry.n} {error_text(row.entry.mean, row.entry.std)}"
        assert line in page.words, line
        assert points(row.cost) in page.words
    assert "p is corrected by Holm for the 9 changes of this table." in page.words
    assert "✕2" in page.words


def test_what_it_ran_on_and_how_to_run_it_again(page: Page):
    assert "torch 2.13.0+cpu" in page.words
    assert "seeds 0 to 4" in page.words
    assert "onehour sweep digits --minibatch 32,64,128,256,512,1024,2048 --seeds 5 --arm" in page.words
    assert 'milestones = ["8", "16", "64/3"]' in page.words
    assert "2 runs have not ended, and count nowhere: 128-s4, zero_gamma=false-512-s4." in page.words
    assert "5 seeds were trained at once, as one network" in page.words


def test_the_same_results_give_the_same_bytes(report: Report, tmp_path: Path):
    studies.write_sweep(tmp_path / "sweep", seeds=2, minibatches=(32, 64), arms=())
    first, second = (write_report([tmp_path / "sweep"], tmp_path / name) for name in "ab")
    for path in sorted(first.folder.rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (second.folder / path.relative_to(first.folder)).read_bytes(), path.name


@pytest.mark.usefixtures("quick")
def test_an_old_report_is_replaced_with_its_figures(tmp_path: Path):
    paths = [studies.write_run(tmp_path / str(k), studies.BASE.replace(minibatch=k), 3.5) for k in (32, 64)]
    out = tmp_path / "out"
    write_report(paths, out)
    assert (out / "figures" / "error-against-time.svg").exists()
    write_report(paths[:1], out)
    assert not (out / "figures" / "error-against-time.svg").exists()
    assert (out / "figures" / "error-against-minibatch.svg").exists()
    (out / "results.json").write_text('{"format": "onehour report 1", "fig')  # cut
    write_report(paths[:1], out)
    assert json.loads((out / "results.json").read_text())["entries"]


@pytest.mark.parametrize("name", ["report.html", "results.json", "results.csv"])
def test_nobody_elses_file_is_overwritten(tmp_path: Path, name: str):
    (tmp_path / name).write_text("mine")
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    with pytest.raises(ValueError, match=f"{name} is not of a report, and would be overwritten; choose another --out"):
        write_report([run], tmp_path)
    assert (tmp_path / name).read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {name, "run"}


def test_where_a_report_goes(tmp_path: Path):
    studies.write_sweep(tmp_path / "sweep", seeds=1, minibatches=(32,), arms=())
    assert folder_for([tmp_path / "sweep"]) == tmp_path / "sweep"
    assert folder_for([tmp_path / "a.csv", Path("elsewhere")]) == tmp_path / "report"
    with pytest.raises(ValueError, match="nothing to report"):
        folder_for([])


@pytest.mark.usefixtures("quick")
def test_outside_text_is_escaped_everywhere(tmp_path: Path):
    name = "<script>alert('1')</script>"
    recipe = studies.BASE.replace(name=name, data="<img src=x onerror=alert(1)>", model="</style><b>")
    spec = studies.write_sweep(tmp_path / "sweep", recipe=recipe, seeds=1, minibatches=(32, 64), arms=())
    environment = {"gpu": "<script>alert(2)</script>", "<b>": "</dd><script>"}
    path = tmp_path / "sweep" / "cells" / next(spec.cells()).name / "environment.json"
    path.write_text(json.dumps({"sessions": [environment]}))
    others = [
        studies.write_csv(tmp_path / "<script>3.csv", [9, 8]),
        studies.write_csv(tmp_path / "c.csv", [9, 8] * 12, minibatch=64, arm="<script>4"),
    ]
    report = write_report([tmp_path / "sweep", *others], tmp_path / "out")
    page = Page(report.page.read_text(encoding="utf-8"))
    assert not {"script", "img"} & set(page.tags)
    assert page.tags.count("b") == len([tag for tag in page.tags if tag == "figcaption"])
    for text in (name, "<script>alert(2)</script>", "</dd><script>", "<script>3", "<script>4", "onerror=alert(1)"):
        assert text in page.words, text


@pytest.mark.usefixtures("quick")
def test_a_recipe_without_a_name_comes_with_its_file(tmp_path: Path):
    recipe = studies.BASE.replace(name="mine")
    studies.write_sweep(tmp_path, recipe=recipe, seeds=1, minibatches=(32,), arms=())
    write_report([tmp_path])
    assert (tmp_path / "base-recipe.toml").read_text(encoding="utf-8") == recipe.to_toml()


@pytest.mark.usefixtures("quick")
def test_curves_alone_make_a_report(tmp_path: Path):
    paths = [studies.write_csv(tmp_path / f"{name}.csv", [50, 9, 8 + n]) for n, name in enumerate("ab")]
    report = write_report(paths)
    assert report.folder == tmp_path / "report"
    page = Page(report.page.read_text(encoding="utf-8"))
    assert "There is no minibatch to judge" in page.words
    assert page.tags.count("svg") == 2
    assert "Others’ files say nothing of it." in page.words
    assert "the median of its last five epochs;" in page.words


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("epochs", [(0.5, 1, 1.5), (5, 10, 15)])
def test_the_last_lines_of_a_curve_are_not_called_epochs_if_they_are_none(epochs: tuple[float, ...], tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("epoch,error\n" + "".join(f"{epoch},9\n" for epoch in epochs), encoding="utf-8")
    page = Page(write_report([path]).page.read_text(encoding="utf-8"))
    assert "the median of its last five evaluations;" in page.words


@pytest.mark.usefixtures("quick")
def test_one_seed_is_said(tmp_path: Path):
    studies.write_sweep(tmp_path, seeds=1, minibatches=(32, 64), arms=())
    page = Page(write_report([tmp_path]).page.read_text(encoding="utf-8"))
    assert "there is no verdict: one seed has no standard deviation" in page.words
    assert "One seed has no std, so none is given." in page.words
    assert "nan" not in page.words
    assert f"--seeds 5 --arm none --out {tmp_path}" in page.words


def test_a_page_of_many_long_runs_stays_small(tmp_path: Path):
    recipe = studies.BASE.replace(epochs=300, milestones=("100", "200"))
    studies.write_sweep(tmp_path, recipe=recipe, seeds=2)
    page, pictures = render(findings_of(read_paths([tmp_path])))
    assert len(pictures) == 6
    assert len(page.encode()) < 1_000_000


@pytest.mark.usefixtures("quick")
def test_the_command_prints_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    studies.write_sweep(tmp_path / "sweep", seeds=5, minibatches=(32, 64, 1024), arms=())
    assert main(["report", str(tmp_path / "sweep"), "--margin", "0.7"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("The recipe holds to minibatch 64 (2×): its error stays within 0.7 points")
    assert said[1].startswith("At 1k (32×) it is 8.40 points worse")
    assert said[-1] == f"report  {tmp_path / 'sweep' / 'report.html'}"
    assert main(["report", str(tmp_path / "sweep"), "--json", "--out", str(tmp_path / "out")]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("quick")
def test_the_command_prints_what_would_decide(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    studies.write_sweep(tmp_path / "sweep", seeds=1, minibatches=(32, 64), arms=())
    assert main(["report", str(tmp_path / "sweep")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("  onehour sweep digits --minibatch 32,64 --seeds 5")


@pytest.mark.parametrize("damage", ["cut", "edited", "no sweep", "no csv", "margin"])
def test_bad_input_is_one_message_and_exit_2_and_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
):
    folder = tmp_path / "sweep"
    studies.write_sweep(folder, seeds=2, minibatches=(32, 64), arms=())
    arguments = [str(folder)]
    if damage == "cut":
        path = folder / "cells" / "64-s1" / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:600])
    elif damage == "edited":
        path = folder / "sweep.toml"
        path.write_text(path.read_text().replace("seeds", "sead", 1))
    elif damage == "no sweep":
        arguments = [str(folder / "cells")]
    elif damage == "no csv":
        (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
        arguments = [str(tmp_path / "a.csv")]
    else:
        arguments += ["--margin", "-1"]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("onehour: ")
    assert len(said.err.splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["matplotlib", "jinja2"])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    run = studies.write_run(tmp_path / "run", studies.BASE, 3.5)
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"a report needs {name}: pip install 'onehour\[report\]'"):
        write_report([run])
    assert not (tmp_path / "report").exists()

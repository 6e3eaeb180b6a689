"""Figures: that they draw what the entries hold, that outside text is text, and that scales keep order."""

import io
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import studies
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from onehour.recipes import resnet50
from onehour.study.curves import MOST, curve_pictures
from onehour.study.figures import arm_pictures, minibatch_picture, per_worker_pictures, seconds_picture
from onehour.study.findings import Findings, findings_of
from onehour.study.marks import Mark, Panel, draw_mark, draw_panels, sheet_with_key, window_of
from onehour.study.picture import FORMATS, NARROW, WIDE, Picture, Sheet, Window, looks
from onehour.study.results import Result, read_paths, read_study, study_of
from onehour.study.verdict import points


def pictures_of(findings: Findings) -> list[Picture]:
    parts = (minibatch_picture, seconds_picture, arm_pictures, per_worker_pictures, curve_pictures)
    return [picture for part in parts for picture in part(findings)]


def texts(sheet: Sheet) -> list[str]:
    """Every text of a figure."""
    from matplotlib.text import Text

    found = sheet.figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible())
    return [artist.get_text() for artist in found if isinstance(artist, Text) and artist.get_text()]


def drawn(picture: Picture, width: float = WIDE) -> Sheet:
    with looks():
        return picture.draw(width)


@given(
    low=st.floats(0, 50), near=st.floats(0.1, 20), far=st.floats(1.2, 100), values=st.lists(st.floats(0, 1), min_size=2)
)
def test_a_window_keeps_order_and_goes_back(low: float, near: float, far: float, values: list[float]):
    window = Window(low, low + near, low + near * far, base=low)
    errors = np.sort(np.array(values)) * (window.high - low) + low
    places = window.forward(errors)
    assert (np.diff(places) >= -1e-12).all()
    assert places.min() >= -1e-12
    assert places.max() <= 1 + 1e-9
    np.testing.assert_allclose(window.backward(places), errors, rtol=1e-6, atol=1e-9)
    ticks = window.ticks()
    assert ticks == sorted(set(ticks))
    assert all(low <= tick <= window.high for tick in ticks)


@given(
    base=st.floats(0.5, 60),
    differences=st.lists(st.floats(-0.4, 90), min_size=1, max_size=8),
    std=st.floats(0, 3),
    margin=st.floats(0.05, 2),
)
def test_every_mean_and_seed_is_inside_its_window(base: float, differences: list[float], std: float, margin: float):
    errors = [min(max(base + difference, 0.0), 100.0) for difference in (0.0, *differences)]
    marks = [Mark(place, error, std, "within", dots=(error,)) for place, error in enumerate(errors)]
    window = window_of(marks, base=base, margin=margin, floor=0.0)
    assume(window.knee > window.low)
    assert window.low <= min(errors) + 1e-9
    assert max(errors) <= window.high + 1e-9
    assert window.forward([base + margin])[0] - window.forward([base])[0] > 0.03  # a margin can be seen


def test_one_value_far_off_is_put_on_a_logarithm_and_near_ones_are_not():
    near = [Mark(0, 3.6, 0.1, "reference"), Mark(1, 3.7, 0.1, "within")]
    assert not window_of(near, base=3.6, margin=0.5, floor=0).broken
    window = window_of([*near, Mark(2, 43.0, 30.0, "beyond")], base=3.6, margin=0.5, floor=0)
    assert [round(end, 2) for end in (window.low, window.knee, window.high)] == [2.7, 6.0, 82.91]


def test_the_papers_figure_stands_beside_its_own_task_alone():
    recipe = resnet50(data="DIR", classes=1000)
    results = [Result(f"{size}", (), size, 0, "finished", 23.6) for size in (256, 512)]
    for changes, found in (({}, True), ({"samples": 50_000}, False), ({"model": "resnet101"}, False)):
        (picture,) = minibatch_picture(findings_of(study_of(results, recipe.replace(**changes))))
        assert ("The paper" in texts(drawn(picture))) == found


def test_an_axis_that_turns_logarithmic_has_two_strokes():
    with looks():
        sheet = Sheet(200, 200)
        axes = sheet.axes(left=20, top=20, width=160, height=160)
        Window(2.0, 6.0, 90.0, base=3.0).apply(axes)
        broken = [line for line in axes.lines if line.get_transform() == axes.transAxes]
        (strokes,) = broken
        heights = np.asarray(strokes.get_ydata(), float)
        assert heights.mean() == pytest.approx(0.7)
        assert len(heights) == 2
        Window(2.0, 6.0, 6.0).apply(sheet.axes(left=20, top=20, width=160, height=160))
    assert not list(sheet.figure.axes[1].lines)


def test_the_first_figure_shows_every_entry_and_marks_the_break(findings: Findings):
    (picture,) = minibatch_picture(findings)
    for width in (WIDE, NARROW):
        found = texts(drawn(picture, width))
        assert {"32", "64", "128", "256", "512", "1k", "2k"} <= set(found)
        assert {"holds to 512", "digits", "64×"} <= set(found)
        assert "The paper" not in found
    (beside,) = minibatch_picture(findings, papers=True)
    assert {"holds to 512", "holds to 8k", "64k", "256×", "The paper"} <= set(texts(drawn(beside)))
    with looks():
        ours, papers = beside.draw(WIDE).figure.axes
        for axes, means in ((ours, [row.entry.mean for row in findings.sizes]), (papers, None)):
            line = next(line for line in axes.lines if len(np.asarray(line.get_xdata())) > 6)
            assert len(np.asarray(line.get_xdata())) == (7 if means else 10)
            if means:
                np.testing.assert_allclose(np.asarray(line.get_ydata(), float), means)
        for above in (0.0, 0.5, 1.5):  # the same points above the reference lie at the same height
            heights = [
                axes.transAxes.inverted().transform(axes.transData.transform((8, base + above)))[1]
                for axes, base in ((ours, 3.6), (papers, 23.6))
            ]
            assert heights[0] == pytest.approx(heights[1], abs=1e-6)
    assert "12.00 %, +8.40 points" in picture.caption
    assert any("2 of 5 runs of minibatch 2k diverged" in note for note in picture.notes)


@pytest.mark.parametrize(
    ("mark", "crosses", "bar"),
    [
        (Mark(5, 50, 40, "beyond", dots=(10.0,), crosses=(90.0, 90.0)), [90.0, 90.0], [0, 100]),  # none lies outside
        (Mark(5, 50, 40, "broke", dots=(10.0, 90.0)), [], []),  # of two kinds
        (Mark(5, 3.0, math.nan, "no verdict", dots=(3.0,)), [], []),
    ],
)
def test_a_non_finite_run_is_a_cross_and_one_seed_or_a_break_has_no_bar(
    mark: Mark, crosses: list[float], bar: list[float]
):
    with looks():
        axes = Sheet(90, 90).axes(left=0, top=0, width=90, height=90)
        draw_mark(axes, mark, width=1, ends=(0, 100))

    def values(**style: str) -> list[float]:
        lines = [line for line in axes.lines if all(getattr(line, f"get_{k}")() == v for k, v in style.items())]
        return [value for line in lines for value in np.asarray(line.get_ydata()).tolist()]

    assert values(marker="x") == crosses
    assert values(linestyle="-") == bar


def test_arms_stand_by_their_cost_with_the_papers_beside(findings: Findings):
    (picture,) = arm_pictures(findings, elsewhere=["n"])
    for width in (WIDE, NARROW):
        found = texts(drawn(picture, width))
        for (_, kind), rows in findings.groups.items():
            names = [row.name for row in rows]
            if kind == "n":
                assert not set(names) & set(found)
            else:
                assert [text for text in found if text in names] == names
                assert {points(row.cost) for row in rows} <= set(found)
        assert {"the paper, at 8k", "within the margin", "some runs broke"} <= set(found)
    assert "loss divided by n, not kn (+" in picture.caption
    assert "at 512" in picture.title
    (axes,) = drawn(picture).figure.axes
    with looks():
        places = [axes.transData.transform((cost, 0))[0] for cost in (0.1, 0.6, 79.0)]
    assert places[1] - places[0] > 20  # half a point is seen beside 79


def test_batchnorms_n_is_drawn_from_three_values_on(findings: Findings, tmp_path: Path):
    (picture,) = per_worker_pictures(findings)
    found = texts(drawn(picture))
    assert {"4", "8", "16", "32", "64", "512", "k=128", "k=1"} <= set(found)
    assert "lowest with n = 16 (3.70 %)" in picture.caption
    assert "highest with n = 4 (7.10 %)" in picture.caption
    arms = tuple((("per_worker", str(n)),) for n in (4, 8))
    studies.write_sweep(tmp_path, seeds=2, minibatches=(512,), arms=arms)
    assert per_worker_pictures(findings_of(read_study([tmp_path]))) == []


def test_curves_are_small_multiples_with_the_gap(findings: Findings):
    sizes, arms = curve_pictures(findings)
    assert [len(drawn(picture).figure.axes) for picture in (sizes, arms)] == [6, 19]
    rows = {row.name: row for row in findings.sizes}
    assert f"gap {points(rows['1024'].early)}" in texts(drawn(sizes))
    assert f"{points(rows['2048'].early)} points at its largest (2k (64×))" in sizes.caption


def test_no_more_curves_than_a_page_can_hold(tmp_path: Path):
    paths = [studies.write_csv(tmp_path / f"{n}.csv", [50 + n / 9, 9, 8]) for n in range(MOST + 3)]
    (picture,) = curve_pictures(findings_of(read_paths(paths)))
    assert len(drawn(picture).figure.axes) == MOST
    assert any(f"The first {MOST} of {MOST + 2} are drawn" in note for note in picture.notes)


def test_time_is_told_with_each_halving(findings: Findings, tmp_path: Path):
    (picture,) = seconds_picture(findings)
    assert "From minibatch 32 to 512 a run’s time goes from 52 s to 14.5 s, 3.6 times as fast," in picture.caption
    assert f"and its error changes by {points(0.1)} points" in picture.caption
    assert len(picture.notes) == 1
    assert {"32", "64", "128", "256", "512", "2k", "15 s", "30 s", "1 min"} <= set(texts(drawn(picture)))
    studies.write_sweep(tmp_path, seeds=2, minibatches=(32, 64), arms=(), together=2)
    (together,) = seconds_picture(findings_of(read_study([tmp_path])))
    assert "2 seeds were trained at once, as one network: a run’s time is its share" in together.notes[1]


def test_texts_lie_inside_the_sheet(findings: Findings):
    """What is written can be read: no text begins or ends outside its figure, at either width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    for picture in pictures_of(findings):
        for width in (WIDE, NARROW):
            with looks():
                figure = picture.draw(width).figure
                renderer = FigureCanvasAgg(figure).get_renderer()
                figure.draw(renderer)
                for text in figure.findobj(Text):
                    assert isinstance(text, Text)
                    if text.get_visible() and text.get_text():
                        box = text.get_window_extent(renderer)
                        beyond = max(-box.x0, box.x1 - figure.bbox.width, -box.y0, box.y1 - figure.bbox.height)
                        assert beyond < 3, (picture.name, width, text.get_text())


def test_a_name_in_any_script_is_drawn(tmp_path: Path):
    recipe = studies.BASE.replace(name="数字 \U0001f600 \x07")
    studies.write_sweep(tmp_path, recipe=recipe, seeds=1, minibatches=(32,), arms=())
    (picture,) = minibatch_picture(findings_of(read_study([tmp_path])))
    assert "数字 \U0001f600" in picture.inline("wide", {})
    assert all(picture.files().values())


def test_files_are_pictures_and_the_same_twice_whatever_the_users_settings(
    findings: Findings, monkeypatch: pytest.MonkeyPatch
):
    import matplotlib

    (picture,), (again,) = minibatch_picture(findings), minibatch_picture(findings)
    first, markup = picture.files(), picture.inline("wide", {})
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    monkeypatch.setitem(matplotlib.rcParams, "axes.grid", True)
    assert (again.files(), again.inline("wide", {})) == (first, markup)
    assert matplotlib.rcParams["font.size"] == 30
    assert list(first) == [f"{picture.name}.{kind}" for kind in FORMATS]
    for content, begins in zip(first.values(), (b"\x89PNG", b"<?xml", b"%PDF"), strict=True):
        assert content.startswith(begins)
        assert len(content) > 10_000
    ElementTree.fromstring(first[f"{picture.name}.svg"])
    with Image.open(io.BytesIO(first[f"{picture.name}.png"])) as image:
        pixels = np.asarray(image.convert("RGB"))
    for edge in (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:]):
        assert (edge == 255).all(), "something is cut at an edge"


def test_a_panel_without_a_break_says_what_is_undecided():
    marks = (Mark(5, 3.6, 0.3, "reference"), Mark(6, 3.9, 0.4, "undecided"))
    panel = Panel("digits", "", marks, ((5, "32", "1×"), (6, "64", "2×")), 0.5, breaks=True)
    with looks():
        sheet = draw_panels([panel], NARROW)
    assert "undecided" in texts(sheet)
    assert not [text for text in texts(sheet) if text.startswith("holds to")]


def test_sizes_that_lie_close_are_not_written_over_each_other(tmp_path: Path):
    recipe = studies.BASE.replace(per_worker=8)
    sizes = [32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128, 1024]
    paths = [studies.write_run(tmp_path / str(size), recipe.replace(minibatch=size), 3.6) for size in sizes]
    (picture,) = minibatch_picture(findings_of(read_study(paths)))
    found = set(texts(drawn(picture, NARROW)))
    assert {"32", "1k"} <= found
    assert not {"40", "88", "104"} & found
    assert len(np.asarray(drawn(picture).figure.axes[0].get_xticks())) == len(sizes)


def test_a_key_takes_the_lines_that_it_needs():
    states = ["reference", "within", "beyond", "broke", "no verdict", "paper"]
    marks = [Mark(5, 3.6, 0.3, state, crosses=(90.0,)) for state in states]
    with looks():
        heights = [sheet_with_key(width, 100, marks).height for width in (WIDE, NARROW)]
        alone = sheet_with_key(NARROW, 100, marks[:1])
    assert [height - 100 for height in heights] == [32, 48]
    assert texts(alone) == ["reference", "diverged (NaN or ∞), scored as chance"]

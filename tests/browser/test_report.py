"""The report in a real browser without a network: nothing asked for, nothing cut, light and dark, wide and narrow.

`make test-browser` installs Chromium, its driver and selenium. Screenshots are kept in tests/browser/screenshots.
"""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onehour.study.report import WrittenReport, write_report

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver")
studies = importlib.import_module("studies")

SHOTS = Path(__file__).parent / "screenshots"
BINARIES = ("chromium", "chromium-browser", "google-chrome")
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND"
NEVER = 1 << 24
"""A width in pixels that no page has."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> WrittenReport:
    path = tmp_path_factory.mktemp("browser") / "sweep"
    recipe = studies.BASE.replace(name="digits")
    studies.write_sweep(path, recipe=recipe, unfinished=["128-s4"], together=5)
    return write_report([path])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium with a network that reaches nothing and a log of what it tries."""
    binary = next((path for path in map(shutil.which, BINARIES) if path), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.fail("no Chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = ["--headless=new", "--hide-scrollbars", "--disable-gpu", NOWHERE, "--proxy-server=127.0.0.1:9"]
    flags += ["--disable-background-networking", "--no-first-run"]
    flags += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def opened(browser: Any, path: Path, *, width: int, scheme: str) -> list[str]:
    """Open a page; returns every address that was asked for."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)  # forgets what came before
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    browser.get(path.as_uri())
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def boxes(browser: Any, selector: str) -> list[dict[str, float]]:
    """Where the elements lie that are shown."""
    found = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => {const b = e.getBoundingClientRect();"
        " return {left: b.left, right: b.right, top: b.top + scrollY, width: b.width, height: b.height}})",
        selector,
    )
    return [box for box in found if box["width"] and box["height"]]


def shot(browser: Any, name: str, width: int) -> bytes:
    """A picture of the whole page, kept."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    content = base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", options)["data"])
    SHOTS.mkdir(exist_ok=True)
    (SHOTS / f"{name}.png").write_bytes(content)
    return content


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_offline_with_every_figure_in_sight(
    browser: Any, report: WrittenReport, width: int, scheme: str
):
    from PIL import Image

    asked = opened(browser, report.page, width=width, scheme=scheme)
    assert asked == [report.page.as_uri()]
    assert browser.get_log("browser") == []
    assert browser.title == "digits: error against minibatch"
    assert browser.execute_script("return document.documentElement.scrollWidth") == width  # no sideways scrolling
    figures = boxes(browser, "figure")
    drawings = boxes(browser, "svg")
    assert len(figures) == len(drawings) == 6  # of each pair one
    for box in (*figures, *drawings):
        assert box["left"] >= 0
        assert box["right"] <= width
        assert box["height"] > 80
    assert {round(box["width"]) for box in drawings} == {760 if width == 1280 else 350}
    with Image.open(io.BytesIO(shot(browser, f"report-{width}-{scheme}", width))) as picture:
        colors = picture.convert("RGB").getcolors(NEVER)
        assert colors is not None
        (_, background) = max((count, color) for count, color in colors if isinstance(color, tuple))
        assert (min(background) > 230) if scheme == "light" else (max(background) < 60)
        assert len(colors) > 100  # something is drawn


@pytest.mark.parametrize("width", [1280, 390])
def test_no_text_is_cut_or_hidden(browser: Any, report: WrittenReport, width: int):
    opened(browser, report.page, width=width, scheme="light")
    for box in boxes(browser, "h1, h2, h3, p, pre, figcaption, svg text, dd, footer, caption"):
        assert box["left"] >= 0, box
        assert box["right"] <= width, box
    assert (
        browser.execute_script(
            "return [...document.querySelectorAll('.table')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
        )
        == 0
    )
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg text')].filter(e => e.getBoundingClientRect().width)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize) * e.getScreenCTM().a)"
    )
    assert min(sizes) > 7.9  # pixels


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_and_marks_can_be_told_from_the_ground(browser: Any, report: WrittenReport, scheme: str):
    """Contrast as WCAG counts it: 4.5 for words, 3 for marks."""
    opened(browser, report.page, width=1280, scheme=scheme)
    names = ("paper", "ink", "soft", "accent", "alert")
    read = "return getComputedStyle(document.documentElement).getPropertyValue('--' + arguments[0])"
    paper, *others = [luminance(browser.execute_script(read, name)) for name in names]
    for name, light in zip(names[1:], others, strict=True):
        high, low = max(paper, light), min(paper, light)
        assert (high + 0.05) / (low + 0.05) >= 4.5, name


def luminance(color: str) -> float:
    """Of #rrggbb, relative to white."""
    channels = [int(color.strip()[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_it_prints_in_black_on_white_with_whole_figures(browser: Any, report: WrittenReport, tmp_path: Path):
    opened(browser, report.page, width=1280, scheme="dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    ink = browser.execute_script("return getComputedStyle(document.body).color")
    assert (ground, ink) == ("rgb(255, 255, 255)", "rgb(28, 33, 40)")
    assert browser.execute_script("return getComputedStyle(document.querySelector('svg.narrow')).display") == "none"
    breaks = "return [...document.querySelectorAll('figure')].map(e => getComputedStyle(e).breakInside)"
    assert set(browser.execute_script(breaks)) == {"avoid"}
    for name, size in (("A4", (8.27, 11.69)), ("Letter", (8.5, 11))):
        paper = {"paperWidth": size[0], "paperHeight": size[1], "printBackground": False}
        content = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", paper)["data"])
        assert content.startswith(b"%PDF"), name
        assert 4 <= content.count(b"/Type /Page\n") + content.count(b"/Type /Page ") <= 14, name
    tall = [box["height"] / box["width"] for box in boxes(browser, "figure")]
    assert max(tall) < 1.3  # of a page's text, so that none is cut


def test_a_hostile_name_does_nothing(browser: Any, tmp_path: Path):
    name = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
    recipe = studies.BASE.replace(name=name)
    studies.write_sweep(tmp_path / "sweep", recipe=recipe, seeds=2, minibatches=(32, 64), arms=())
    report = write_report([tmp_path / "sweep"])
    asked = opened(browser, report.page, width=1280, scheme="light")
    assert asked == [report.page.as_uri()]
    assert browser.get_log("browser") == []
    assert browser.title == f"{name}: error against minibatch"
    assert browser.execute_script("return document.querySelector('h1').textContent").startswith(name)


@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_of_one_seed_and_one_of_curves(browser: Any, tmp_path: Path, width: int):
    studies.write_sweep(tmp_path / "sweep", seeds=1, minibatches=(32, 64, 1024), arms=())
    curves = [studies.write_csv(tmp_path / f"{name}.csv", [50, 20, 9, 8]) for name in ("mine", "yours")]
    for number, paths in enumerate(([tmp_path / "sweep"], curves)):
        report = write_report(paths)
        opened(browser, report.page, width=width, scheme="light")
        assert browser.execute_script("return document.documentElement.scrollWidth") == width
        assert boxes(browser, "svg")
        shot(browser, f"small-{number}-{width}", width)

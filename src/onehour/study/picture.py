"""How every figure looks: a sheet measured in points, a scale, and the figure as SVG, PNG and PDF."""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, FAINT, WASH, PAPER = "#1c2128", "#69717d", "#d5d9df", "#eef1f5", "#ffffff"
ACCENT, ALERT = "#2160a8", "#c0431a"
VARIABLES = {INK: "ink", SOFT: "soft", FAINT: "faint", WASH: "wash", PAPER: "paper", ACCENT: "accent", ALERT: "alert"}
"""The page's CSS variable of each colour, so that a figure follows light and dark."""

WIDE, NARROW = 760, 350  # widths in points: of a page's column, and of a telephone's
APART = 0.07  # of an axis, between two ticks of the logarithmic part
SHARE = 0.7  # of an axis, below the knee
BREAK = 0.008  # of an axis, from the knee to each of the two strokes of a break
PAD = 10  # points of paper around a figure in a file, so that no mark or letter lies on its edge

FORMATS = ("png", "svg", "pdf")
SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
UNDATED = {
    "svg": {"Date": None, "Creator": None, "Format": None, "Type": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}
"""Without what would differ between two times or versions."""

NUMBER = re.compile(r"\d+\.\d{2,}")
DIGITS = {"d": 1, "x": 1, "y": 1, "width": 1, "height": 1, "transform": 2, "viewBox": 1}
"""Attributes whose numbers are rounded, to so many digits."""


@contextmanager
def looks() -> Iterator[None]:
    """Draw and save inside this: nobody's own matplotlib settings count, and the same figure gives the same bytes."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a name in another script
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.hashsalt": "onehour",
                "svg.fonttype": "none",
                "pdf.fonttype": 42,
                "font.family": "DejaVu Sans",
                "font.size": 11,
                "text.color": INK,
                "axes.labelcolor": SOFT,
                "axes.edgecolor": FAINT,
                "axes.facecolor": "none",
                "axes.titlesize": 11,
                "axes.unicode_minus": True,
                "figure.facecolor": PAPER,
                "savefig.facecolor": PAPER,
                "text.parse_math": False,
            }
        )
        yield


class Sheet:
    """A figure whose axes are placed in points from the top left, so that no text is squeezed."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure(figsize=(width / 72, height / 72))

    def axes(self, *, left: float, top: float, width: float, height: float) -> Axes:
        """Axes whose frame lies there, of which the foot alone is drawn, with small quiet ticks."""
        bottom = self.height - top - height
        axes = self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=10, labelcolor=SOFT, pad=5)
        axes.set_axisbelow(True)
        return axes

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        """Text whose first line's baseline lies there."""
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)


@dataclass(frozen=True)
class Window:
    """A scale for errors of which some lie far off: even from `low` to `knee`, logarithmic from there to `high`."""

    low: float  # in percent or points
    knee: float
    high: float  # nothing is logarithmic where it is the knee
    base: float = 0.0  # below the knee: what distances are counted from beyond it
    most: float = 100.0  # above which no number is written
    negated: bool = False  # its numbers are written with the other sign

    @property
    def broken(self) -> bool:
        return self.high > self.knee

    def forward(self, values: Any) -> np.ndarray:
        """Where values lie, from 0 to 1."""
        values = np.asarray(values, float)
        near = (values - self.low) / (self.knee - self.low)
        if not self.broken:
            return near
        times = np.maximum(values - self.base, self.knee - self.base) / (self.knee - self.base)
        far = SHARE + (1 - SHARE) * np.log(times) / math.log(self._times)
        return np.where(values <= self.knee, near * SHARE, far)

    def backward(self, places: Any) -> np.ndarray:
        places = np.asarray(places, float)
        if not self.broken:
            return self.low + places * (self.knee - self.low)
        near = self.low + places / SHARE * (self.knee - self.low)
        times = self._times ** np.maximum((places - SHARE) / (1 - SHARE), 0)
        return np.where(places <= SHARE, near, self.base + (self.knee - self.base) * times)

    @property
    def _times(self) -> float:
        return (self.high - self.base) / (self.knee - self.base)

    def ticks(self) -> list[float]:
        """Round numbers to write on it."""
        from matplotlib.ticker import MaxNLocator

        round_ones = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(self.low, self.knee)
        ticks = [float(tick) for tick in round_ones if self.low <= tick <= self.knee]
        far = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 3, 5)] if self.broken else []
        for tick in [*(-tick for tick in reversed(far)), *far]:
            last = ticks[-1] if ticks else self.low
            apart = self.forward([tick])[0] - self.forward([last])[0]
            if self.knee < tick <= min(self.high, self.most) and apart >= APART:
                ticks.append(tick)
        return ticks

    def apply(self, axes: Axes, which: Literal["x", "y"] = "y") -> None:
        """Set the axis to it: ticks, faint lines, and where the logarithmic part begins a dotted line and a break."""
        ticks = self.ticks()
        set_scale, axis = (axes.set_yscale, axes.yaxis) if which == "y" else (axes.set_xscale, axes.xaxis)
        set_scale("function", functions=(self.forward, self.backward))
        axes.set(**{f"{which}lim": (self.low, self.high)})
        axis.set_ticks(ticks, [f"{-tick if self.negated and tick else tick:g}".replace("-", "−") for tick in ticks])
        axis.set_ticks([], minor=True)
        axes.grid(axis=which, color=FAINT, linewidth=0.6)
        if self.broken:
            line = axes.axhline if which == "y" else axes.axvline
            line(self.knee, color=SOFT, linewidth=0.7, dashes=(1, 3))
            ends = [0.0] * 2, [SHARE - BREAK, SHARE + BREAK]
            slash = [(-1, -0.6), (1, 0.6)] if which == "y" else [(-0.6, -1), (0.6, 1)]
            mark: dict[str, Any] = {"marker": slash, "markersize": 6.5, "linestyle": "none", "color": SOFT}
            ends = ends if which == "y" else ends[::-1]
            axes.plot(*ends, transform=axes.transAxes, clip_on=False, zorder=6, **mark)


@dataclass(frozen=True)
class Picture:
    """A figure of a report."""

    name: str  # of its files, and of its place on the page
    title: str
    caption: str  # what it finds, one sentence with numbers
    draw: Callable[[float], Sheet]  # the sheet at a width in points, `WIDE` or `NARROW`
    notes: tuple[str, ...] = ()  # what else a reader must know, a sentence each

    def inline(self, kind: Literal["wide", "narrow"], classes: dict[str, str]) -> str:
        """SVG for the page, in its colours, with ids of its own, naming nothing outside.

        Class names by their style grow by those that it needs.
        """
        root = _stripped(ElementTree.fromstring(self._drawn(WIDE if kind == "wide" else NARROW, "svg")))
        prefix = f"{self.name}-{kind}-"
        used = set(re.findall(r"#([\w.-]+)", " ".join(value for e in root.iter() for value in e.attrib.values())))
        fine = set(root.iterfind(".//defs/path"))  # shapes of marks, which are small
        for element in root.iter():
            kept = {name: _rewritten(name, value, prefix, element in fine) for name, value in element.attrib.items()}
            style = kept.pop("style", "").replace(f"font-family: {SANS}; ", "")
            for color, variable in VARIABLES.items():
                style = style.replace(color, f"var(--{variable})")
            if style:
                kept["class"] = classes.setdefault(style, f"s{len(classes)}")
            own = kept.pop("id", "")
            kept["id"] = prefix + own if own in used else ""
            element.attrib.clear()
            element.attrib |= {name: value for name, value in kept.items() if value}
        box = root.attrib["viewBox"]
        root.attrib.clear()
        root.attrib |= {"class": kind, "role": "img", "aria-label": f"{self.title}. {self.caption}", "viewBox": box}
        return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))

    def files(self) -> dict[str, bytes]:
        """The figure's files by name, for papers and pages elsewhere."""
        return {f"{self.name}.{kind}": self._drawn(WIDE, kind, pad=PAD) for kind in FORMATS}

    @cached_property
    def _wide_sheet(self) -> Sheet:
        return self.draw(WIDE)

    def _drawn(self, width: float, kind: str, pad: float = 0) -> bytes:
        from matplotlib.transforms import Bbox

        content = io.BytesIO()
        with looks():
            sheet = self._wide_sheet if width == WIDE else self.draw(width)
            box = Bbox.from_extents(-pad / 72, -pad / 72, (sheet.width + pad) / 72, (sheet.height + pad) / 72)
            sheet.figure.savefig(content, format=kind, dpi=200, metadata=UNDATED[kind], bbox_inches=box)
        return content.getvalue().replace(b"font-family: 'DejaVu Sans'", f"font-family: {SANS}".encode())


def _stripped(root: ElementTree.Element) -> ElementTree.Element:
    """The tree as HTML has it: no namespaces, metadata or style sheets, and no groups that hold or say nothing."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in [name for name in element.attrib if "}" in name]:
            element.attrib[name.rpartition("}")[2]] = element.attrib.pop(name)
    for parent in reversed(list(root.iter())):
        for place, child in reversed(list(enumerate(parent))):
            if child.tag in ("metadata", "style") or (child.tag in ("g", "defs") and not len(child)):
                parent.remove(child)
            elif child.tag == "g" and set(child.attrib) <= {"id"}:
                parent[place : place + 1] = list(child)
    return root


def _rewritten(name: str, value: str, prefix: str, fine: bool) -> str:
    if name == "transform" and value.startswith("rotate(-0 "):
        return ""
    if name in DIGITS:
        digits = 2 if fine else DIGITS[name]
        value = NUMBER.sub(lambda number: f"{float(number[0]):.{digits}f}".removesuffix(".0"), value)
        return re.sub(r"\s+", " ", value).strip()
    return value.replace("#", f"#{prefix}", 1) if name in ("href", "clip-path") else value

"""How every figure looks, on a paper's sheet measured in points, and as pages and files have it: SVG, PNG, PDF."""

from __future__ import annotations

import io
import math
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "ALERT",
    "FAINT",
    "FORMATS",
    "INK",
    "NARROW",
    "PAPER",
    "SOFT",
    "VARIABLES",
    "WASH",
    "WIDE",
    "Picture",
    "Sheet",
    "Window",
    "bare",
    "looks",
    "spaced",
]

INK, SOFT, FAINT, WASH, PAPER = "#1c2128", "#69717d", "#d5d9df", "#eef1f5", "#ffffff"
ACCENT, ALERT = "#2160a8", "#c0431a"
VARIABLES = {INK: "ink", SOFT: "soft", FAINT: "faint", WASH: "wash", PAPER: "paper", ACCENT: "accent", ALERT: "alert"}
"""The page's CSS variable of each colour, so that a figure follows light and dark."""

WIDE, NARROW = 760, 350
"""Widths in points: of a page's column, and of a telephone's."""

APART = 0.07
"""Of an axis, between two ticks of the logarithmic part."""


@contextmanager
def looks() -> Iterator[None]:
    """Draw and save inside this: nobody's own matplotlib settings count, and the same figure gives the same bytes.

    >>> with looks():
    ...     import matplotlib
    ...     matplotlib.rcParams["svg.hashsalt"]
    'onehour'
    """
    import matplotlib

    with matplotlib.rc_context():
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
    """A figure whose axes are placed in points from the top left, so that no text is squeezed.

    >>> with looks():
    ...     sheet = Sheet(WIDE, 200)
    ...     axes = sheet.axes(left=50, top=10, width=300, height=150)
    >>> float(axes.get_position().width) == 300 / WIDE
    True
    """

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Figure = Figure(figsize=(width / 72, height / 72))

    def axes(self, *, left: float, top: float, width: float, height: float) -> Axes:
        """Axes whose frame lies there.

        >>> with looks():
        ...     float(Sheet(100, 100).axes(left=0, top=0, width=50, height=50).get_position().y0)
        0.5
        """
        bottom = self.height - top - height
        axes = self.figure.add_axes((left / self.width, bottom / self.height, width / self.width, height / self.height))
        return bare(axes)

    def text(self, left: float, top: float, text: str, **style: Any) -> None:
        """Text whose first line's baseline lies there.

        >>> with looks():
        ...     Sheet(100, 100).text(0, 20, "a title")
        """
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)


@dataclass(frozen=True)
class Window:
    """A scale for errors of which some lie far off: even from `low` to `knee`, logarithmic from there to `high`.

    Args:
        low, knee, high: in percent or points; nothing is logarithmic where knee and high are one.
        base: what distances are counted from beyond the knee; below it.
        share: of the axis, below the knee.

    >>> window = Window(0.0, 1.0, 100.0, share=0.75)
    >>> window.forward([0.0, 1.0, 10.0]).tolist()
    [0.0, 0.75, 0.875]
    """

    low: float
    knee: float
    high: float
    base: float = 0.0
    share: float = 0.7

    @property
    def broken(self) -> bool:
        """Whether there is anything beyond the knee.

        >>> Window(0.0, 10.0, 10.0).broken
        False
        """
        return self.high > self.knee

    def forward(self, values: Any) -> np.ndarray:
        """Where values lie, from 0 to 1.

        >>> Window(0.0, 10.0, 10.0).forward([5.0]).tolist()
        [0.5]
        """
        values = np.asarray(values, float)
        near = (values - self.low) / (self.knee - self.low)
        if not self.broken:
            return near
        times = np.maximum(values - self.base, self.knee - self.base) / (self.knee - self.base)
        far = self.share + (1 - self.share) * np.log(times) / math.log(self._times)
        return np.where(values <= self.knee, near * self.share, far)

    def backward(self, places: Any) -> np.ndarray:
        """`forward`, the other way.

        >>> Window(0.0, 1.0, 100.0, share=0.75).backward([0.75, 0.875]).round(9).tolist()
        [1.0, 10.0]
        """
        places = np.asarray(places, float)
        if not self.broken:
            return self.low + places * (self.knee - self.low)
        near = self.low + places / self.share * (self.knee - self.low)
        times = self._times ** np.maximum((places - self.share) / (1 - self.share), 0)
        return np.where(places <= self.share, near, self.base + (self.knee - self.base) * times)

    @property
    def _times(self) -> float:
        return (self.high - self.base) / (self.knee - self.base)

    def ticks(self, count: int = 5) -> list[float]:
        """Round numbers to write on it.

        >>> Window(2.6, 6.0, 90.0, base=3.6).ticks()
        [3.0, 4.0, 5.0, 6.0, 10.0, 20.0, 50.0]
        """
        from matplotlib.ticker import MaxNLocator

        round_ones = MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(self.low, self.knee)
        ticks = [float(tick) for tick in round_ones if self.low <= tick <= self.knee]
        if self.broken:
            for tick in (digit * 10.0**power for power in range(-2, 4) for digit in (1, 2, 3, 5)):
                last = ticks[-1] if ticks else self.low
                if (
                    self.knee < tick <= min(self.high, 100.0)
                    and self.forward([tick])[0] - self.forward([last])[0] >= APART
                ):
                    ticks.append(tick)
        return ticks

    def apply(self, axes: Axes, which: str = "y", *, count: int = 5) -> None:
        """Set the axis to it: ticks, faint lines, and a dotted line where the logarithmic part begins.

        >>> with looks():
        ...     Window(0.0, 10.0, 100.0).apply(Sheet(100, 100).axes(left=20, top=10, width=70, height=70))
        """
        upright = which == "y"
        (axes.set_yscale if upright else axes.set_xscale)("function", functions=(self.forward, self.backward))
        (axes.set_ylim if upright else axes.set_xlim)(self.low, self.high)
        axis = axes.yaxis if upright else axes.xaxis
        ticks = self.ticks(count)
        axis.set_ticks(ticks, [f"{tick:g}".replace("-", "−") for tick in ticks])
        axis.set_ticks([], minor=True)
        axes.grid(axis="y" if upright else "x", color=FAINT, linewidth=0.6)
        if self.broken:
            line = axes.axhline if upright else axes.axvline
            line(self.knee, color=SOFT, linewidth=0.7, dashes=(1, 3))


def bare(axes: Axes) -> Axes:
    """Axes without a frame but for the foot, with small quiet ticks.

    >>> with looks():
    ...     bare(Sheet(100, 100).figure.add_subplot()).spines["top"].get_visible()
    False
    """
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, labelsize=10, labelcolor=SOFT, pad=5)
    axes.set_axisbelow(True)
    return axes


def spaced(values: Sequence[float]) -> list[float]:
    """Small even offsets around 0, one a value, so that equal seeds do not hide each other.

    >>> spaced([3.5, 3.6, 3.7])
    [-1.0, 0.0, 1.0]
    """
    middle = (len(values) - 1) / 2
    return [(number - middle) / max(middle, 1) for number in range(len(values))]


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


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Args:
        name: of its files, and of its place on the page.
        title: what it shows.
        caption: what it finds, one sentence with numbers.
        draw: the sheet at a width in points, `WIDE` or `NARROW`.
        notes: what else a reader must know, a sentence each.

    >>> def draw(width):
    ...     sheet = Sheet(width, 40)
    ...     sheet.text(0, 20, "<b>")
    ...     return sheet
    >>> picture, classes = Picture("empty", "Nothing", "There is 1 figure.", draw), {}
    >>> "&lt;b&gt;" in picture.inline("wide", classes), classes["s0"]
    (True, 'fill: var(--paper)')
    """

    name: str
    title: str
    caption: str
    draw: Callable[[float], Sheet]
    notes: tuple[str, ...] = ()

    def inline(self, kind: Literal["wide", "narrow"], classes: dict[str, str]) -> Markup:
        """SVG for the page, in its colours, with ids of its own, naming nothing outside.

        Args:
            kind: for a page's column and for paper, or for a telephone.
            classes: style sheets by class name, which grow by those that it needs.

        >>> "var(--" in Picture("a", "", "", lambda width: Sheet(width, 9)).inline("narrow", {})
        False
        """
        root = _without_namespaces(ElementTree.fromstring(self._wide_svg if kind == "wide" else self._svg(NARROW)))
        prefix = f"{self.name}-{kind}-"
        used = set(re.findall(r"#([\w.-]+)", " ".join(value for e in root.iter() for value in e.attrib.values())))
        names = {style: name for name, style in classes.items()}
        fine = set(root.iterfind(".//defs/path"))  # shapes of marks, which are small
        for element in root.iter():
            kept = {name: _rewritten(name, value, prefix, element in fine) for name, value in element.attrib.items()}
            style = _themed(kept.pop("style", ""))
            if style:
                kept["class"] = names.setdefault(style, f"s{len(names)}")
            if kept.get("id") in used:
                kept["id"] = prefix + kept["id"]
            else:
                kept.pop("id", None)
            element.attrib.clear()
            element.attrib.update({name: value for name, value in kept.items() if value})
        classes.update({name: style for style, name in names.items()})
        box = root.attrib["viewBox"]
        root.attrib.clear()
        root.attrib |= {"class": kind, "role": "img", "aria-label": f"{self.title}. {self.caption}", "viewBox": box}
        return Markup(re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode")))

    def files(self) -> dict[str, bytes]:
        """The figure's files by name, for papers and pages elsewhere.

        >>> list(Picture("a", "", "", lambda width: Sheet(width, 9)).files())
        ['a.png', 'a.svg', 'a.pdf']
        """
        return {f"{self.name}.{kind}": self._file(kind) for kind in FORMATS}

    def _file(self, kind: str) -> bytes:
        if kind == "svg":
            return self._wide_svg.encode()
        content = io.BytesIO()
        with _drawing():
            self._wide_sheet.figure.savefig(content, format=kind, dpi=200, metadata=UNDATED[kind])
        return content.getvalue()

    @cached_property
    def _wide_sheet(self) -> Sheet:
        with _drawing():
            return self.draw(WIDE)

    @cached_property
    def _wide_svg(self) -> str:
        return self._svg(WIDE)

    def _svg(self, width: float) -> str:
        text = io.StringIO()
        with _drawing():
            sheet = self._wide_sheet if width == WIDE else self.draw(width)
            sheet.figure.savefig(text, format="svg", metadata=UNDATED["svg"])
        return text.getvalue().replace("font-family: 'DejaVu Sans'", f"font-family: {SANS}")


@contextmanager
def _drawing() -> Iterator[None]:
    with looks(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # of a name in another script
        yield


def _without_namespaces(root: ElementTree.Element) -> ElementTree.Element:
    """The tree as HTML has it, without metadata, style sheets, and groups that hold nothing or say nothing."""
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


def _themed(style: str) -> str:
    style = style.replace(f"font-family: {SANS}; ", "")
    for color, variable in VARIABLES.items():
        style = style.replace(color, f"var(--{variable})")
    return style

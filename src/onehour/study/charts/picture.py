"""A figure as a page and as files have it: inline SVG that follows light and dark; PNG, SVG and PDF."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from markupsafe import Markup

from onehour.study.charts.style import NARROW, VARIABLES, WIDE, Sheet, looks

__all__ = ["FORMATS", "Picture"]

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

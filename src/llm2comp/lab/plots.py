"""Plots of collapse and training: figures, files on white, and SVG for a page.

The SVG takes its colours from the page around it.

Figures are built without pyplot, so nothing global changes. Colours were chosen for all kinds of
colour vision; line style and marker tell the series apart as well.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from cycler import cycler
from matplotlib import style, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from llm2comp.errors import DataError
from llm2comp.system.files import write_bytes

INK, GRID, PAPER = "#1d2630", "#dbe0e6", "#ffffff"
SERIES = ("#0b62a4", "#c2500a", "#0d7f5f", "#a2458a", "#8a6d00", "#5b5fc7")
# What stands for each of these colours in a page: its own variables (see lab/report/page.css), its
# text colour, its background.
PAGE_COLOURS = {INK: "currentColor", GRID: "var(--grid)", PAPER: "none"} | {
    colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)
}
FEW_POINTS, SMALL_MATRIX, BINS = 30, 64, 50  # marked one by one; drawn cell by cell; of a histogram
LONG_NAME = 44  # in characters; a longer name in a legend loses its middle
_LINES, _MARKERS = (
    ("-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1.2, 1, 1.2, 1, 1.2))),
    ("o", "s", "^", "D", "v", "P"),
)
_STYLE: dict[str, Any] = {
    "figure.figsize": (4.4, 3.0),
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.formatter.useoffset": False,
    "axes.prop_cycle": cycler(color=SERIES, linestyle=_LINES, marker=_MARKERS),
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "llm2comp",
}
_styled = style.context(["default", _STYLE])


@_styled
def spectrum_figure(spectra: Mapping[str, Sequence[float]]) -> Figure:
    """Singular values, largest first, on a log axis, one line per name (arXiv 2110.09348).

    Zeros are left out.
    """
    points = {
        name: [(i, float(v)) for i, v in enumerate(values, 1) if v > 0]
        for name, values in spectra.items()
    }
    return curves_figure(points, "direction, largest first", "singular value", log_y=True)


@_styled
def curves_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    log_y: bool = False,
    joined: bool = True,
) -> Figure:
    """One line per name through its (x, y) points; not `joined`: the points alone.

    Raises DataError when there is no point at all.
    """
    if not any(curves.values()):
        raise DataError(
            "nothing to plot", expected="a curve with one point or more", found=list(curves)
        )
    figure, axes = _figure(xlabel, ylabel)
    for points in curves.values():
        xy = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        (line,) = axes.plot(*xy.T)
        if not joined:
            line.set_linestyle("none")
        elif len(xy) > FEW_POINTS:
            line.set_marker("")
    if all(float(x).is_integer() for points in curves.values() for x, _ in points):
        axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_PlainLog())
        axes.yaxis.set_minor_formatter(_PlainLog(minor_thresholds=(1, 0.4)))
    _legend(figure, axes.lines, list(curves))
    return figure


@_styled
def heatmap_figure(matrix_KK: ArrayLike, title: str) -> Figure:
    """Cosines between memory tokens as colours, from 0 (or the lowest) to 1.

    Raises DataError for what is no square.
    """
    matrix = np.asarray(matrix_KK, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size or len(set(matrix.shape)) != 1:
        raise DataError("no square matrix", expected="shape (K, K)", found=matrix.shape)
    figure, axes = _figure("memory token", "memory token")
    edges = np.arange(len(matrix) + 1) + 0.5
    low = min(0.0, float(np.nanmin(matrix)))
    cells = axes.pcolormesh(
        edges, edges, matrix, cmap="cividis", vmin=low, vmax=1, edgecolors="face", linewidth=0.3
    )
    cells.set_rasterized(len(matrix) > SMALL_MATRIX)
    axes.set_title(_text(title))
    axes.set_aspect("equal")
    axes.invert_yaxis()
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(8, integer=True))
    bar = figure.colorbar(cells, label="mean cosine")
    bar.outline.set_visible(False)
    return figure


@_styled
def scores_figure(random_cosines: ArrayLike, related_cosines: ArrayLike | None) -> Figure:
    """How often which cosine occurs, between random and between related texts.

    Raises DataError without finite cosines.
    """
    groups = {"random pairs": random_cosines, "related pairs": related_cosines}
    cosines = {
        name: np.ravel(np.asarray(x, dtype=np.float64))
        for name, x in groups.items()
        if x is not None
    }
    for name, values in cosines.items():
        if not values.size or not np.isfinite(values).all():
            raise DataError(
                "cosines that cannot be plotted",
                where=name,
                expected="one or more finite numbers",
                found=values,
            )
    figure, axes = _figure("cosine", "share of pairs")
    edges = np.histogram_bin_edges(np.concatenate(list(cosines.values())), BINS)
    handles = []
    for values, colour, line in zip(cosines.values(), SERIES, _LINES, strict=False):
        shares = np.histogram(values, edges)[0] / values.size
        handles.append(axes.stairs(shares, edges, color=colour, linestyle=line, linewidth=1.8))
        axes.stairs(shares, edges, fill=True, color=colour, alpha=0.15)
    axes.set_ylim(bottom=0)
    _legend(figure, handles, list(cosines))
    return figure


@_styled
def save_figure(figure: Figure, stem: Path) -> None:
    """Write `stem`.png and `stem`.svg, on white; the same figure gives the same bytes.

    Raises RunError as `files` does.
    """
    for ending, options in (
        ("png", {"dpi": 200, "metadata": {"Software": None}}),
        ("svg", {"metadata": _NO_METADATA}),
    ):
        content = io.BytesIO()
        figure.savefig(content, format=ending, **options)
        write_bytes(stem.parent / f"{stem.name}.{ending}", content.getvalue())


@_styled
def inline_svg(figure: Figure, label: str, prefix: str) -> str:
    """The figure as an <svg> element of an HTML page, in the page's colours and font.

    Args:
        figure: from this module.
        label: what a screen reader says.
        prefix: makes the ids in it unique in the page.
    """
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata=_NO_METADATA)
    root = ElementTree.fromstring(content.getvalue())
    viewbox = root.get("viewBox", "")
    for parent in root.iter():
        for child in [child for child in parent if _local(child.tag) in ("metadata", "style")]:
            parent.remove(child)  # its style would hold for the whole page
        parent.tag = _local(parent.tag)
        parent.attrib = {
            _local(key): _adapt(_local(key), value, prefix) for key, value in parent.attrib.items()
        }
    root.attrib = {"viewBox": viewbox, "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


class _PlainLog(ticker.LogFormatter):
    """Labels of a log axis as plain numbers, 0.001 rather than a power with a raised exponent."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


_NO_METADATA: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def _local(name: str) -> str:
    """A name without its namespace, which HTML supplies itself."""
    return name.rpartition("}")[2]


def _adapt(key: str, value: str, prefix: str) -> str:
    """One attribute's value: ids get the prefix, colours and font become the page's."""
    if key == "id":
        return f"{prefix}-{value}"
    if key in ("href", "clip-path"):
        return re.sub(r"^(url\()?#", rf"\1#{prefix}-", value)
    if key == "style":
        value = re.sub(r"font-family: [^;]*; ", "", value)
        return re.sub(r"#[0-9a-f]{6}", lambda found: PAGE_COLOURS.get(found[0], found[0]), value)
    return value


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(_text(xlabel))
    axes.set_ylabel(_text(ylabel))
    return figure, axes


def _legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """Names above the plot, where they hide nothing; none for a single line."""
    if len(names) > 1:
        short = [
            name
            if len(name) <= LONG_NAME
            else f"{name[: LONG_NAME // 2 - 1]}…{name[-LONG_NAME // 2 :]}"
            for name in names
        ]
        columns = 2 if max(map(len, short)) <= LONG_NAME // 2 else 1
        figure.legend(
            handles,
            [_text(name) for name in short],
            loc="outside upper left",
            ncols=columns,
            handlelength=2.6,
        )


def _text(text: str) -> str:
    """Text as it stands: no mathematics between dollars, no name hidden by an underscore."""
    plain = text.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain

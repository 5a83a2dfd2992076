"""Parts of the page: tables, plots with their numbers, sections, and number formats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from matplotlib.figure import Figure

from llm2comp.lab.plots import curves_figure, inline_svg

Points = Sequence[tuple[float, float]]
NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the rows.

    `numeric`: the other columns are right-aligned numbers.
    """

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True


@dataclass(frozen=True)
class Plot:
    """A plot, a sentence on how to read it, and its numbers.

    Without a plot the numbers are shown alone.

    `ident` is unique in the page.
    """

    ident: str
    title: str
    svg: Markup
    reading: str
    table: Table


@dataclass(frozen=True)
class PageSection:
    """A section of the page, listed in its contents; an empty one is not shown."""

    ident: str
    title: str
    text: tuple[str, ...] = ()
    cards: tuple[tuple[str, str, str], ...] = ()  # label, figure, note
    facts: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    code: str = ""
    folded: bool = False  # its tables are folded at first
    lead: str = ""  # one sentence that stands out, before the text


@dataclass(frozen=True)
class Part:
    """One run, or the comparison of several."""

    ident: str
    title: str
    subtitle: str = ""
    sections: Sequence[PageSection] = field(default_factory=list)


def number(x: float | None) -> str:
    """Format a number with decimals that fit its size."""
    if x is None:
        return NONE
    size = abs(x)
    if 0 < size < 0.01 or not math.isfinite(x):
        return f"{x:.4g}"
    return f"{x:.4f}" if size < 10 else f"{x:.2f}" if size < 1000 else f"{x:,.0f}"


def percent(x: float | None) -> str:
    """A score of 0 to 1 times 100, two places."""
    return NONE if x is None else f"{100 * x:.2f}"


def duration(seconds: float) -> str:
    """Format seconds in readable units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def drawn(ident: str, title: str, of: str, figure: Figure, reading: str, table: Table) -> Plot:
    """A matplotlib figure as a plot of the page; `of` is the label for screen readers."""
    label = f"{of}: {title}. Its numbers are in the table below it."
    return Plot(ident, title, Markup(inline_svg(figure, label, ident)), reading, table)


def curves(
    ident: str,
    title: str,
    of: str,
    lines: Mapping[str, Points],
    reading: str,
    ylabel: str = "",
    beside: Mapping[str, Points] | None = None,
) -> list[Plot]:
    """Curves against the step, as a plot in a list that is empty without points.

    The table also holds those `beside` them.

    What was measured at one step alone is no curve: its numbers are shown.
    """
    shown = {name: points for name, points in lines.items() if points}
    if not shown:
        return []
    columns = {name: dict(points) for name, points in {**shown, **(beside or {})}.items() if points}
    steps = sorted({step for column in columns.values() for step in column})
    rows = tuple(
        (f"{step:,.0f}", *(number(column.get(step)) for column in columns.values()))
        for step in steps
    )
    table = Table(f"{of}: {title.lower()} at each step", ("step", *columns), rows)
    if len({step for points in shown.values() for step, _ in points}) < 2:
        return [Plot(ident, title, Markup(), f"Measured at one step alone. {reading}", table)]
    figure = curves_figure(shown, "step", ylabel or next(iter(shown)))
    return [drawn(ident, title, of, figure, reading, table)]

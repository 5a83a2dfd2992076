"""Figures of a study: averages by system and stage, and over each numeric axis of its grid.

Bars are standard deviations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from llm2comp.lab.plots import INK, curves_figure
from llm2comp.lab.study.results import Results, StudyRow, averages, mean_sd

Points = list[tuple[float, float, float | None]]  # x, y, standard deviation


def figures(results: Results) -> dict[str, Figure]:
    """File name → figure; none where nothing has an average."""
    rows = [row for row in results.rows if averages(row, results.sets)]
    found = {"averages": by_system(rows, results.sets)} if rows else {}
    for axis in dict.fromkeys(axis for row in rows for axis in row.axes):
        if all(_is_number(row.axes[axis]) for row in rows if axis in row.axes):
            found[f"over-{axis}"] = over_axis(rows, axis, results.sets)
    return found


def by_system(rows: Sequence[StudyRow], sets: Sequence[str]) -> Figure:
    """A line per system, the average along it, a marker per stage."""
    systems = list(dict.fromkeys(row.system for row in rows))
    points: dict[str, Points] = {}
    for row in rows:
        mean, sd = _average(row, sets)
        points.setdefault(row.stage, []).append((mean, systems.index(row.system), sd))
    figure = _with_bars(points, "average over all sets, percent", "", along_x=True)
    (axes,) = figure.axes
    axes.set_yticks(range(len(systems)), [name.replace("$", r"\$") for name in systems])
    axes.set_ylim(len(systems) - 0.5, -0.5)
    figure.set_size_inches(6.4, 1.4 + 0.26 * len(systems))
    return figure


def over_axis(rows: Sequence[StudyRow], axis: str, sets: Sequence[str]) -> Figure:
    """The average over a numeric axis of the grid, a line per stage and rest of the system."""
    points: dict[str, Points] = {}
    for row in rows:
        if axis in row.axes:
            others = [f"{name}{value}" for name, value in row.axes.items() if name != axis]
            mean, sd = _average(row, sets)
            points.setdefault(f"{'-'.join([row.base, *others])}, {row.stage}", []).append(
                (float(row.axes[axis]), mean, sd)
            )
    figure = _with_bars(
        {name: sorted(line) for name, line in points.items()},
        axis,
        "average over all sets, percent",
    )
    (axes,) = figure.axes
    values = sorted({x for line in points.values() for x, *_ in line})
    if values[0] > 0 and values[-1] > 8 * values[0]:
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{x:g}" for x in values])
        axes.set_xticks([], minor=True)
    figure.set_size_inches(6.4, 3.6 + 0.12 * len(points))
    return figure


def _with_bars(
    points: Mapping[str, Points], xlabel: str, ylabel: str, along_x: bool = False
) -> Figure:
    figure = curves_figure(
        {name: [(x, y) for x, y, _ in line] for name, line in points.items()},
        xlabel,
        ylabel,
        joined=not along_x,
    )
    (axes,) = figure.axes
    lines = list(axes.lines)
    for line, values in zip(lines, points.values(), strict=True):
        for x, y, sd in values:
            if sd is not None:
                across, up = (sd, None) if along_x else (None, sd)
                axes.errorbar(
                    x,
                    y,
                    up,
                    across,
                    color=line.get_color(),
                    capsize=2.5,
                    elinewidth=1,
                    marker="",
                    linestyle="none",
                )
    axes.tick_params(colors=INK)
    return figure


def _average(row: StudyRow, sets: Sequence[str]) -> tuple[float, float | None]:
    mean, sd = mean_sd(list(averages(row, sets).values()))
    assert mean is not None, row.system
    return mean, sd


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

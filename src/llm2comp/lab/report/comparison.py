"""Several runs side by side, and the published figures."""

from __future__ import annotations

from collections.abc import Sequence

from llm2comp.lab.evaluation.published import SOURCE, published
from llm2comp.lab.report.blocks import (
    NONE,
    PageSection,
    Part,
    Plot,
    Points,
    Table,
    curves,
    duration,
    number,
    percent,
)
from llm2comp.lab.report.reading import RunLog, by_data, columns
from llm2comp.lab.report.sections import evaluation_table, spectrum_plots
from llm2comp.lab.report.verdict import measured_states
from llm2comp.lab.report.words import FIGURES, LOSS
from llm2comp.recipe import leaves

ALIKE = "The recipes of these runs are the same."
IDENT = "compare"


def comparison_part(runs: Sequence[RunLog]) -> Part:
    """Final figures, settings that differ, and joint plots of loss and spectrum."""
    final = _side_by_side(
        "Where each run ended", "figure", {run.label: final_figures(run) for run in runs}
    )
    settings = {run.label: settings_of(run) for run in runs}
    changed = _side_by_side("Settings that differ", "setting", settings, differing=True)
    evaluations = {
        f"{run.label}: {name}": entry
        for run in runs
        for name, entry in columns(run.evaluations).items()
    }
    scores = [evaluation_table(by_data(evaluations))] if evaluations else []
    sections = [
        PageSection(f"{IDENT}-final", "Final figures", tables=(final, *scores)),
        PageSection(f"{IDENT}-settings", "Changed settings", tables=(changed,))
        if changed.rows
        else PageSection(f"{IDENT}-settings", "Changed settings", text=(ALIKE,)),
    ]
    if plots := tuple(_plots(runs)):
        sections.append(PageSection(f"{IDENT}-plots", "Loss and spectrum", plots=plots))
    return Part(IDENT, "Comparison", f"{len(runs)} runs side by side.", sections)


def final_figures(run: RunLog) -> dict[str, str]:
    """Name of a figure → its last value, for what this run has."""
    figures = {}
    done = [stage.done.seconds for stage in run.stages if stage.done]
    if done:
        figures["training time"] = duration(sum(done))
    for stage in run.stages:
        figures[f"{stage.title}, steps"] = f"{stage.reached:,}"
        if stage.metrics:
            figures[f"{stage.title}, last loss"] = number(stage.metrics[-1].loss)
    for _, watch in measured_states(run)[-1:]:
        figures |= {name: number(value(watch)) for name, value in FIGURES.items()}
        figures |= {
            f"{task}, watched, × 100": percent(score) for task, score in watch.tasks.items()
        }
    for row in [row for row in run.demo if row.effective_rank is not None][-1:]:
        figures["Python documentation, nDCG@10 × 100"] = percent(row.ndcg_at_10)
        figures["Python documentation, MRR@10 × 100"] = percent(row.mrr_at_10)
    return figures


def settings_of(run: RunLog) -> dict[str, str]:
    """Dotted name of a setting → its value; the recipe's name is none."""
    tree = run.recipe.model_dump(mode="json", exclude={"name"})
    return {name: "null" if value is None else str(value) for name, value in leaves(tree).items()}


def _side_by_side(
    caption: str, first: str, columns: dict[str, dict[str, str]], differing: bool = False
) -> Table:
    """One row per name that appears in any column, or only the rows that differ."""
    names = dict.fromkeys(name for column in columns.values() for name in column)
    rows = [(name, *(column.get(name, NONE) for column in columns.values())) for name in names]
    shown = (
        [row for row in rows if len(set(row[1:])) > 1]
        if differing
        else [row for row in rows if set(row[1:]) != {NONE}]
    )
    return Table(caption, (first, *columns), tuple(shown), numeric=not differing)


def _plots(runs: Sequence[RunLog]) -> list[Plot]:
    plots: list[Plot] = []
    for place, (name, reading) in enumerate(LOSS.items(), 1):
        lines: dict[str, Points] = {
            run.label: [(line.step, line.loss) for line in stage.metrics]
            for run in runs
            for stage in run.stages
            if stage.name == name and stage.metrics
        }
        if len(lines) > 1:
            plots += curves(
                f"{IDENT}-{name}", f"Loss of stage {place}", "All runs", lines, reading, "loss"
            )
    spectra = {
        run.label: states[-1][1].spectrum for run in runs if (states := measured_states(run))
    }
    return plots + spectrum_plots(f"{IDENT}-spectrum", "All runs, where each ended", spectra)


def published_section() -> PageSection:
    """The paper's table, folded."""
    rows = published()
    tasks = dict.fromkeys(task for row in rows for task in row.scores)
    cells = tuple(
        (
            row.model,
            row.stage,
            row.samples,
            *(_as_printed(x) for x in (row.average, *map(row.scores.get, tasks))),
        )
        for row in rows
    )
    table = Table(
        "The paper's table, in percent", ("model", "stage", "samples", "average", *tasks), cells
    )
    return PageSection(
        "published", "Published figures", text=(f"{SOURCE}.",), tables=(table,), folded=True
    )


def _as_printed(percent: float | None) -> str:
    return NONE if percent is None else f"{percent:.2f}"

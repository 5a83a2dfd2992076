"""Scores of a study → means and deviations over seeds, paired bootstrap, table in CSV, Markdown and
on the console.

Paired bootstrap of two systems at one stage. d[s, t] is the difference of their scores at seed s on
set t, for the seeds at which both have every set; a cell is one d[s, t]. A resample draws as many
cells as there are, with replacement, and takes their mean: both systems are always seen on the same
seed and set. With one seed only sets are drawn.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.table import Table

from llm2comp.lab.evaluation.published import SOURCE, published
from llm2comp.recipe import Section
from llm2comp.system.console import console

TRAINING_FREE, MODEL = "training-free", "model"
RESAMPLES, NONE = 10_000, "–"
HERE, PAPER = "here", "paper"


class StudyRow(Section):
    """One system at one stage: seed → set → percent, seed → effective rank, seed → samples trained
    on so far.
    """

    system: str
    stage: str
    base: str
    axes: dict[str, str] = {}
    scores: dict[int, dict[str, float]] = {}
    ranks: dict[int, float] = {}
    samples: dict[int, int] = {}


def merged(row: StudyRow, more: StudyRow) -> StudyRow:
    """One row with the seeds of both, sorted."""
    both = {
        name: dict(sorted((getattr(row, name) | getattr(more, name)).items()))
        for name in ("scores", "ranks", "samples")
    }
    return row.model_copy(update=both)


class Failure(Section):
    """A run, stage or model that could not be trained or scored, and why."""

    system: str
    run: str
    reason: str


class Results(Section):
    """All results of a study."""

    format_version: Literal[1] = 1
    name: str
    sets: tuple[str, ...]
    rows: tuple[StudyRow, ...]
    failures: tuple[Failure, ...] = ()
    published: bool = False


def averages(row: StudyRow, sets: Sequence[str]) -> dict[int, float]:
    """Seed → mean over all sets; none where a set is missing, as it would be a mean of something
    else.
    """
    return {
        seed: float(np.mean([scores[name] for name in sets]))
        for seed, scores in row.scores.items()
        if sets and all(name in scores for name in sets)
    }


def mean_sd(values: ArrayLike) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation (n − 1); None where there are too few values."""
    array = np.asarray(values, dtype=np.float64)
    return (
        float(array.mean()) if array.size else None,
        float(array.std(ddof=1)) if array.size > 1 else None,
    )


def resample_indices(count: int) -> NDArray[np.int64]:
    """Cells of each resample, (resamples, count): always the same ones."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def bootstrap(differences_N: ArrayLike) -> tuple[float, float, float]:
    """Lower and upper end of the 95 % percentile interval of the mean, and the share of resamples
    with a mean above 0.
    """
    cells_N = np.asarray(differences_N, dtype=np.float64)
    means = cells_N[resample_indices(len(cells_N))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high), float((means > 0).mean())


def comparisons(results: Results) -> list[dict[str, Any]]:
    """Every pair of systems at the same stage that share a seed with all sets; `difference` = first
    − second, in points.

    A pair with the same scores throughout is left out: a stage that both share, not two systems
    that do equally well.
    """
    found = []
    for a, b in combinations(results.rows, 2):
        seeds = sorted(set(averages(a, results.sets)) & set(averages(b, results.sets)))
        if a.stage != b.stage or not seeds:
            continue
        cells = [
            a.scores[seed][name] - b.scores[seed][name] for seed in seeds for name in results.sets
        ]
        if not any(cells):
            continue
        low, high, above = bootstrap(cells)
        record = {
            "stage": a.stage,
            "first": a.system,
            "second": b.system,
            "seeds": len(seeds),
            "sets": len(results.sets),
        }
        found.append(
            record
            | {
                "difference": float(np.mean(cells)),
                "low": low,
                "high": high,
                "share_above_0": above,
            }
        )
    return found


def records(results: Results) -> list[dict[str, Any]]:
    """A flat record per system and stage, in percent; then, if asked for, the paper's rows in
    columns of their own.
    """
    found = []
    for row in results.rows:
        whole = averages(row, results.sets)
        count = None if row.stage in (TRAINING_FREE, MODEL) else len(whole)
        samples = round(float(np.mean(list(row.samples.values())))) if row.samples else None
        record: dict[str, Any] = {
            "source": HERE,
            "system": row.system,
            "stage": row.stage,
            "seeds": count,
            "samples": samples,
        }
        columns = {"effective_rank": list(row.ranks.values()), "average": list(whole.values())}
        columns |= {
            name: [scores[name] for scores in row.scores.values() if name in scores]
            for name in results.sets
        }
        for name, values in columns.items():
            record[f"{name}_mean"], record[f"{name}_sd"] = mean_sd(values)
        reasons = [
            f"{failure.run}: {failure.reason}"
            for failure in results.failures
            if failure.system == row.system
        ]
        found.append(record | {"failed": "; ".join(reasons)})
    for known in published() if results.published else ():
        cited = {
            f"paper: {name}": value
            for name, value in ({"average": known.average} | known.scores).items()
        }
        found.append(
            {"source": PAPER, "system": known.model, "stage": known.stage, "samples": known.samples}
            | cited
        )
    return found


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """All records under the union of their columns; an empty field where there is no figure."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(
        {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows
    )
    return out.getvalue()


def main_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table for people."""
    figures = ["effective_rank", "average", *results.sets]
    header = ["system", "stage", "seeds", "samples", "effective rank", "average", *results.sets]
    rows = []
    for record in records(results.model_copy(update={"published": False})):
        first = [
            record["system"],
            record["stage"],
            _plain(record["seeds"]),
            _plain(record["samples"]),
        ]
        rows.append(
            first + [_with_sd(record[f"{name}_mean"], record[f"{name}_sd"]) for name in figures]
        )
    return header, rows


def pair_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the paired comparisons."""
    header = [
        "stage",
        "first − second",
        "seeds × sets",
        "difference",
        "95 % interval",
        "share above 0",
    ]
    rows = []
    for each in comparisons(results):
        cells = [
            each["stage"],
            f"{each['first']} − {each['second']}",
            f"{each['seeds']} × {each['sets']}",
        ]
        interval = f"{each['low']:+.2f} to {each['high']:+.2f}"
        rows.append(
            [*cells, f"{each['difference']:+.2f}", interval, f"{each['share_above_0']:.3f}"]
        )
    return header, rows


def published_cells() -> tuple[list[str], list[list[str]]]:
    """Header and rows of the paper's table."""
    known = published()
    tasks = list(dict.fromkeys(task for row in known for task in row.scores))
    rows = [
        [
            row.model,
            row.stage,
            row.samples,
            *(_with_sd(value, None) for value in (row.average, *map(row.scores.get, tasks))),
        ]
        for row in known
    ]
    return ["model", "stage", "samples", "average", *tasks], rows


def as_markdown(results: Results) -> str:
    """All tables, with what their figures are."""
    parts = [
        f"# Study {results.name}",
        "In percent: mean over seeds ± sample standard deviation. The average is over "
        "the sets of this table and over seeds "
        "that have them all (`seeds` counts these).",
        _markdown(*main_cells(results)),
    ]
    header, rows = pair_cells(results)
    if rows:
        about = (
            f"{RESAMPLES:,} resamples of (seed, set) cells in pairs; what this can tell and "
            "what not: docs/studies.md."
        )
        parts += ["## Pairs", about, _markdown(header, rows)]
    if results.failures:
        reasons = [[failure.run, " ".join(failure.reason.split())] for failure in results.failures]
        parts += ["## Failed", _markdown(["what", "reason"], reasons)]
    if results.published:
        note = (
            "Cited, not run here; other tasks and other backbones than above: not to be set "
            f"against it. {SOURCE}."
        )
        parts += ["## Published", note, _markdown(*published_cells())]
    return "\n\n".join(parts) + "\n"


def shown(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> Table:
    """A table for the console; the first `words` columns hold words, the others figures; cut to no
    width but a terminal's.
    """
    table = Table(title=title, title_justify="left")
    if not console.is_terminal:
        table.width = 1 + sum(
            3 + max(map(len, column)) for column in zip(header, *rows, strict=True)
        )
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _plain(value: int | None) -> str:
    return NONE if value is None else f"{value:,}"


def _with_sd(mean: float | None, sd: float | None) -> str:
    return NONE if mean is None else f"{mean:.2f}" + (f" ± {sd:.2f}" if sd is not None else "")

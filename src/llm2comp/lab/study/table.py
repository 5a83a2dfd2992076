"""The results of a study as CSV, as Markdown and as tables on the console."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from llm2comp.lab.evaluation.published import SOURCE, published
from llm2comp.lab.study.results import NONE, RESAMPLES, Results, comparisons, records
from llm2comp.system.console import console


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
        "In percent: mean over seeds ± sample standard deviation. The average is over the sets of "
        "this table and over seeds that have them all (`seeds` counts these).",
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
    """A table for the console; the first `words` columns hold words, the others figures.

    Only a terminal's width cuts it.
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

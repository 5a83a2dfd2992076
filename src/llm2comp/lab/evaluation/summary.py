"""What models scored: kept in `summary.json` beside mteb's own results, and shown as a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.table import Table

from llm2comp.errors import RunError
from llm2comp.lab.evaluation.paper14 import PAPER14
from llm2comp.lab.evaluation.published import published
from llm2comp.runs.folder import Run
from llm2comp.system.console import say
from llm2comp.system.files import explain_disk_errors, to_json, write_text

SCORES_FOLDER, SUMMARY_FILE = "scores", "summary.json"
# Where results go when no model is of a run, below the working directory.
RESULTS_FOLDER = Path("llm2comp-scores")


@dataclass(frozen=True)
class ModelScores:
    """What one model got: task → {score (0 to 1), metric, split, data}; task → why it failed."""

    model: str
    name: str
    revision: str
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def results_folder(model: str, out: Path | None = None, beside: Sequence[str] = ()) -> Path:
    """Where a model's results go: `out`, or `scores/` in its run, or in the first run among those
    `beside` it, or one here.
    """
    run = next((run for each in (model, *beside) if (run := Run.of(each))), None)
    return out or (run.path / SCORES_FOLDER if run else RESULTS_FOLDER)


def table(rows: Sequence[ModelScores], compare: bool = False) -> Table:
    """Tasks down, models across, in percent; `compare` adds the paper's figures of its tasks."""
    tasks = list(dict.fromkeys(task for row in rows for task in (*row.scores, *row.failed)))
    shown = Table("task", "figure")
    columns: list[dict[str, str]] = []
    for row in rows:
        shown.add_column(f"{row.model}\n{row.revision}", justify="right")
        cells = dict.fromkeys(row.failed, "failed")
        cells |= {task: f"{100 * found['score']:.2f}" for task, found in row.scores.items()}
        columns.append(cells | {"average": _average(row, tasks)})
    if compare and any(task in PAPER14 for task in tasks):
        for known in published():
            shown.add_column(f"{known.model}\n{known.stage}, paper", justify="right")
            cells = {task: f"{value:.2f}" for task, value in known.scores.items()}
            whole = known.average is not None and set(tasks) == set(PAPER14)
            columns.append(cells | {"average": f"{known.average:.2f}" if whole else ""})
    metrics = {task: found["metric"] for row in rows for task, found in row.scores.items()}
    for task in (*tasks, "average"):
        shown.add_row(task, metrics.get(task, ""), *(cells.get(task, "–") for cells in columns))
    return shown


def _average(row: ModelScores, tasks: Sequence[str]) -> str:
    """Mean over all tasks asked for; empty where one is missing."""
    if not tasks or any(task not in row.scores for task in tasks):
        return ""
    return f"{100 * sum(row.scores[task]['score'] for task in tasks) / len(tasks):.2f}"


def read_summary(file: Path) -> list[ModelScores]:
    """Rows of a summary file, none where there is no such file.

    Raises RunError when it is damaged.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        for row in rows:
            row.pop("synthetic", None)  # earlier versions wrote it
        return [ModelScores(**row) for row in rows]
    except (ValueError, TypeError, AttributeError) as error:
        fix = "give another --out, or move it away; results beside it remain"
        raise RunError(f"is damaged, or another's: {error}", where=str(file), fix=fix) from None


def earlier_rows(rows: Sequence[ModelScores], folder: Path) -> list[ModelScores]:
    """Models with results in a folder, as far as they share tasks with `rows`."""
    tasks = {task for row in rows for task in (*row.scores, *row.failed)}
    known = {(row.name, row.revision) for row in rows}
    before = [
        row for row in read_summary(folder / SUMMARY_FILE) if (row.name, row.revision) not in known
    ]
    cut = [
        replace(row, scores={t: s for t, s in row.scores.items() if t in tasks}, failed={})
        for row in before
    ]
    return [row for row in cut if row.scores]


def keep(file: Path, row: ModelScores) -> None:
    """Put a row into the summary, beside those of other models and processes.

    What it got in other tasks stays. Scores of others on what a task's data were before are left
    out: beside the new ones they would be taken for scores on the same data.
    """
    with explain_disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_name(f".{file.name}.lock")):
            rows = read_summary(file)
            same = [old for old in rows if (old.name, old.revision) == (row.name, row.revision)]
            scores = {
                task: score for old in same for task, score in old.scores.items()
            } | row.scores
            kept = [_comparable(old, row) for old in rows if old not in same]
            merged = replace(row, scores=scores)
            write_text(file, to_json([vars(one) for one in (*kept, merged)], indent=1))


def _comparable(old: ModelScores, new: ModelScores) -> ModelScores:
    """A row without scores of tasks whose data were others than `new` has; says which."""
    gone = [
        task
        for task, found in old.scores.items()
        if found.get("data") and found["data"] != new.scores.get(task, found).get("data")
    ]
    if gone:
        say(f"left out of the summary, on other data: {', '.join(gone)} of {old.model}")
    return replace(old, scores={t: found for t, found in old.scores.items() if t not in gone})

"""The paper's table as data: 14 MTEB tasks in percent, for every system (arXiv 2511.17129)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files

SOURCE = (
    "Zhang et al., Learning to Compress (LLM2Comp), AAAI 2026, arXiv 2511.17129; Llama-2-7B "
    "unless the row says otherwise"
)


@dataclass(frozen=True)
class PublishedRow:
    """One system: `stage` (training-free, pretext, UCL, SCL), training `samples` as printed,
    percent per mteb task name.

    A task that the paper leaves blank is missing in `scores`; `average` is the printed one, None
    where blank.
    """

    stage: str
    model: str
    samples: str
    scores: dict[str, float]
    average: float | None


def published() -> list[PublishedRow]:
    """All rows, in the paper's order."""
    with files("llm2comp.lab.evaluation").joinpath("published.csv").open(encoding="utf-8") as lines:
        table = list(csv.DictReader(lines))
    rows = []
    for row in table:
        stage, model, samples, average = (
            row.pop(key) for key in ("stage", "model", "samples", "average")
        )
        scores = {task: float(value) for task, value in row.items() if value}
        rows.append(
            PublishedRow(stage, model, samples, scores, float(average) if average else None)
        )
    return rows

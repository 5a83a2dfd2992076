"""Scores of a study → means and deviations over seeds, paired bootstrap.

Paired bootstrap of two systems at one stage. d[s, t] is the difference of their scores at seed s on
set t, for the seeds at which both have every set; a cell is one d[s, t]. A resample draws as many
cells as there are, with replacement, and takes their mean: both systems are always seen on the same
seed and set. With one seed only sets are drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm2comp.lab.evaluation.published import published
from llm2comp.recipe import Section

TRAINING_FREE, MODEL = "training-free", "model"
RESAMPLES, NONE = 10_000, "–"
HERE, PAPER = "here", "paper"


class StudyRow(Section):
    """One system at one stage, by seed: set → percent, effective rank, samples trained on."""

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
    """Seed → mean over all sets; left out where a set is missing."""
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
    """Ends of the mean's 95 % percentile interval, and the share of resample means above 0."""
    cells_N = np.asarray(differences_N, dtype=np.float64)
    means = cells_N[resample_indices(len(cells_N))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high), float((means > 0).mean())


def comparisons(results: Results) -> list[dict[str, Any]]:
    """Every pair of systems at the same stage that share a seed with all sets.

    `difference` is first − second, in points.

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
    """A flat record per system and stage, in percent.

    If asked for, the paper's rows follow, in columns of their own.
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

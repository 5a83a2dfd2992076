"""Names → mteb tasks: the paper's 14, any task, any benchmark, folders of local sets."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb

from llm2comp.errors import DataError
from llm2comp.lab.evaluation.local import as_mteb, find_sets
from llm2comp.lab.evaluation.paper14 import PAPER14

PAPER14_NAME = "paper14"


def named_tasks(names: Sequence[str]) -> list[Any]:
    """Tasks by name: `paper14`, an mteb task, or an mteb benchmark such as `MTEB(eng, v2)`.

    Raises:
        DataError: no such task or benchmark; names the nearest.
    """
    tasks: dict[str, Any] = {}
    for name in names:
        for task in _tasks_of(name):
            tasks.setdefault(task.metadata.name, task)
    return list(tasks.values())


def local_tasks(folder: Path) -> list[Any]:
    """All local sets below a folder. Raises DataError for one that is none or is malformed."""
    return [as_mteb(found) for found in find_sets(folder)]


def _tasks_of(name: str) -> list[Any]:
    with warnings.catch_warnings():
        # that a task has a newer version: the paper's are asked for by name
        warnings.simplefilter("ignore")
        if name == PAPER14_NAME:
            return [
                mteb.get_task(task.name, hf_subsets=_subsets(task.subset))
                for task in PAPER14.values()
            ]
        benchmarks = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
        if name in benchmarks:
            return list(benchmarks[name].tasks)
        try:
            return [
                mteb.get_task(
                    name, hf_subsets=_subsets(PAPER14[name].subset) if name in PAPER14 else None
                )
            ]
        except KeyError:
            known = [
                PAPER14_NAME,
                *benchmarks,
                *(task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)),
            ]
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise DataError(
                "no such task or benchmark",
                where=name,
                expected="paper14, or a name of mteb's",
                fix=f"did you mean {nearest!r}?",
            ) from None


def _subsets(subset: str) -> list[str] | None:
    return None if subset == "default" else [subset]

"""Batches of contrastive learning: how many different rows there are, and tables of pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

from datasets import Dataset

from llm2comp.data.loaded import Pair
from llm2comp.errors import DataError
from llm2comp.recipe import ContrastiveStage
from llm2comp.system.console import say

AnyStage = TypeVar("AnyStage", bound=ContrastiveStage)


def enough(stage: str, rows: int) -> None:
    """Raise DataError when there are no two different rows to tell apart."""
    if rows < 2:
        expected = "two or more that differ and are long enough"
        raise DataError(
            "too few usable rows",
            where=f"{stage}.data",
            expected=expected,
            found=f"{rows:,}",
            fix="give more data",
        )


def clipped(name: str, stage: AnyStage, rows: int, ranks: int = 1) -> AnyStage:
    """The stage with batches that so many different rows can fill, on all devices at once.

    Raises DataError where there are no two, or not one for each device.
    """
    enough(name, rows)
    most = rows // ranks
    if most >= stage.batch_size:
        return stage
    each = f" on each of {ranks:,} devices" if ranks > 1 else ""
    if not most:
        problem = "fewer different rows than devices"
        raise DataError(problem, where=f"{name}.data", expected=f"{ranks:,}", found=f"{rows:,}")
    say(
        f"{name}: batches of {most:,}{each}, as there are no more different rows (batch_size: "
        f"{stage.batch_size:,})"
    )
    return stage.model_copy(update={"batch_size": most})


def pair_datasets(pairs: Sequence[Pair], batch_size: int) -> dict[str, Any]:
    """Pairs as one table per number of hard negatives: a batch needs as many for each query.

    Where too few for a batch have so many negatives, the last ones of these are dropped; where too
    few have so little, the pairs are left out.

    Raises:
        DataError: no two different pairs.
    """
    groups: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[len(pair.negatives)].append(pair)
    for count in sorted(groups, reverse=True):
        if most_in_a_batch(groups[count]) < batch_size and count > min(groups):
            groups[max(fewer for fewer in groups if fewer < count)] += groups.pop(count)
    lowest = min(groups)
    if len(groups) == 1:
        enough("scl", most_in_a_batch(groups[lowest]))
    elif most_in_a_batch(groups[lowest]) < batch_size:
        say(
            f"left out: {len(groups.pop(lowest)):,} pairs with {lowest} hard negatives, "
            "too few for a batch"
        )
    tables = {}
    for count, group in sorted(groups.items()):
        columns = {"anchor": [p.anchor for p in group], "positive": [p.positive for p in group]}
        columns |= {f"negative_{i + 1}": [p.negatives[i] for p in group] for i in range(count)}
        tables[f"with {count} hard negatives"] = Dataset.from_dict(columns)
    return tables


def most_in_a_batch(pairs: Sequence[Pair]) -> int:
    """How many pairs one batch without duplicates can hold, at most."""
    return min(len({pair.anchor for pair in pairs}), len({pair.positive for pair in pairs}))

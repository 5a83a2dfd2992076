"""Hard negatives for weak pairs: passages that an encoder ranks high, below the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import mine_hard_negatives

from llm2comp.data.weak_pairs import WeakPair
from llm2comp.errors import DataError
from llm2comp.lab.adapt.corpus import LEAST_PAIRS, rows_of

CANDIDATES, MARGIN = 30, 0.05


def with_negatives(
    pairs: Sequence[WeakPair], model: SentenceTransformer, count: int, least: int = LEAST_PAIRS
) -> list[dict[str, Any]]:
    """Pairs as rows, each with so many mined negatives; pairs that find fewer are left out.

    What scores above (1 − MARGIN) of the right passage may well be right, too, and is not taken.

    Raises DataError: not even `least` are left.
    """
    rows = rows_of(pairs)
    if not count:
        return rows
    kept = {(row["anchor"], row["positive"]): row for row in rows}
    found: Any = mine_hard_negatives(
        Dataset.from_list([{key: row[key] for key in ("anchor", "positive")} for row in rows]),
        model,
        anchor_column_name="anchor",
        positive_column_name="positive",
        range_max=CANDIDATES,
        relative_margin=MARGIN,
        num_negatives=count,
        output_format="n-tuple",
        verbose=False,
    )
    names = [f"negative_{n}" for n in range(1, count + 1)]
    mined = []
    for anchor, positive, *negatives in (row.values() for row in found):
        row = kept[anchor, positive]
        mined.append(row | dict(zip(names, negatives, strict=True)))
    if len(mined) < least:
        raise DataError(
            f"too few pairs have {count} hard negatives",
            where="--negatives",
            expected=f"{least} or more of {len(pairs):,} pairs",
            found=len(mined),
            fix="give fewer --negatives or none, or add documents",
        )
    return mined

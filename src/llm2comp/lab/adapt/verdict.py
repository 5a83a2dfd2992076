"""What to use on these documents: systems on the held-out queries, compared query by query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from llm2comp.lab.evaluation.retrieval import FUSED_DEPTH, Collection, Ranking, fuse
from llm2comp.lab.study.results import bootstrap

BM25, LM, START, ADAPTED = "BM25", "untrained LM", "starting encoder", "adapted encoder"
FEW = 50  # queries
Scores = Mapping[str, NDArray[np.float64]]  # system → nDCG@10 of each query


def hybrid(name: str) -> str:
    """What an encoder is called whose ranking is fused with BM25's."""
    return f"{name} + {BM25}"


# The simplest first: a later one takes the place only if it is measurably better.
OPTIONS = (BM25, hybrid(START), START, hybrid(ADAPTED), ADAPTED)
SAID = {
    BM25: "keep BM25: the adapted encoder is not better on your documents",
    hybrid(START): "use hybrid with the encoder that you started from: adapting it brought nothing "
    "that can be measured",
    START: "use the encoder that you started from, alone: neither adapting nor words help it",
    hybrid(ADAPTED): "use hybrid with the adapted encoder",
    ADAPTED: "use the adapted encoder alone: words do not help it on your documents",
}


def systems(collection: Collection, rankings: Mapping[str, list[Ranking]]) -> Scores:
    """nDCG@10 of each query, of BM25, of each encoder by its rankings, and of both fused."""
    words = collection.by_bm25(FUSED_DEPTH)
    found = {BM25: collection.ndcg_of_each(words)}
    for name, ranked in rankings.items():
        found[name] = collection.ndcg_of_each(ranked)
        fused = [fuse(both) for both in zip(ranked, words, strict=True)]
        found[hybrid(name)] = collection.ndcg_of_each(fused)
    return found


@dataclass(frozen=True)
class Verdict:
    """What to use, and the sentence that says so with its figures."""

    choice: str
    sentence: str

    @classmethod
    def of(cls, scores: Scores) -> Verdict:
        """By the paired bootstrap: 95 % intervals of the mean difference, query by query."""
        choice = BM25
        for name in OPTIONS[1:]:
            if name in scores and bootstrap(scores[name] - scores[choice])[0] > 0:
                choice = name
        best = max((n for n in OPTIONS if n in scores), key=lambda n: float(scores[n].mean()))
        shown = choice if choice != BM25 else hybrid(ADAPTED)
        low, high, _ = bootstrap(scores[shown] - scores[BM25])
        figures = (
            f"{shown} {100 * scores[shown].mean():.1f} against {100 * scores[BM25].mean():.1f} of "
            f"BM25, difference {100 * low:+.1f} to {100 * high:+.1f}"
        )
        more = "" if best in (choice, shown) else f"; highest, but not measurably: {best}"
        few = len(scores[BM25])
        wide = f"; {few} queries alone, so intervals are wide" if few < FEW else ""
        return cls(choice, f"{SAID[choice]} ({figures}{more}{wide})")


def records(scores: Scores) -> list[dict[str, Any]]:
    """A row for each system: nDCG@10 and the ends of its 95 % interval, 0 to 1."""
    rows = []
    for name, found in scores.items():
        low, high, _ = bootstrap(found)
        mean = float(found.mean())
        rows.append({"system": name, "ndcg_at_10": mean, "low": low, "high": high})
    return rows


def table(rows: list[dict[str, Any]], queries: int, documents: int) -> Table:
    """The systems as a rich table."""
    title = f"held-out: {queries:,} queries over {documents:,} passages"
    shown = Table("system", "nDCG@10", "95 % interval", title=title)
    for row in rows:
        low, high = 100 * row["low"], 100 * row["high"]
        shown.add_row(row["system"], f"{100 * row['ndcg_at_10']:.1f}", f"{low:.1f} to {high:.1f}")
    return shown

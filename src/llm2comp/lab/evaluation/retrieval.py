"""Retrieval on a small collection: nDCG@10 and MRR@10 by sentence-transformers' own evaluator.

For an encoder, for BM25, and for both merged by reciprocal rank fusion (Cormack et al., SIGIR
2009): each ranking gives a document 1 / (60 + its rank), and documents are sorted by the sum.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import bm25s
import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim
from torch import Tensor

DEPTH = 10
# Documents of each ranking that are fused, and the constant of the formula (both as is usual).
FUSED_DEPTH, FUSED_CONSTANT = 100, 60
Ranking = list[tuple[str, float]]  # ids of documents and their scores, the best first


@dataclass(frozen=True)
class Scores:
    """Retrieval figures, 0 to 1."""

    ndcg_at_10: float
    mrr_at_10: float


class Collection:
    """Queries, documents and which document answers which query.

    Args:
        queries: id → text.
        documents: id → text.
        relevant: query id → ids of its documents.
    """

    def __init__(
        self,
        queries: Mapping[str, str],
        documents: Mapping[str, str],
        relevant: Mapping[str, set[str]],
    ) -> None:
        self.documents = dict(documents)
        self.relevant = {query: set(relevant[query]) for query in queries}
        self._evaluator = InformationRetrievalEvaluator(
            dict[str, Any](queries),
            dict[str, Any](documents),
            {query: set(ids) for query, ids in relevant.items()},
            mrr_at_k=[DEPTH],
            ndcg_at_k=[DEPTH],
            accuracy_at_k=[1],
            precision_recall_at_k=[1],
            map_at_k=[DEPTH],
            score_functions={"cosine": cos_sim},
            write_csv=False,
        )

    def score(self, model: SentenceTransformer, documents_ND: Tensor | None = None) -> Scores:
        """Rank all documents by cosine; queries get the model's query prompt.

        `documents_ND`: embedded before, in order.
        """
        found: Any = self._evaluator.compute_metrices(model, corpus_embeddings=documents_ND)[
            "cosine"
        ]
        return _scores(found)

    def score_bm25(self) -> Scores:
        """Rank by BM25, the lexical reference."""
        return self._score_rankings(self.by_bm25(DEPTH))

    def score_fused(self, model: SentenceTransformer, documents_ND: Tensor | None = None) -> Scores:
        """Rank by the encoder and by BM25 together. Arguments as `score`."""
        both = zip(self.by_cosine(model, documents_ND), self.by_bm25(FUSED_DEPTH), strict=True)
        return self._score_rankings([fuse(rankings) for rankings in both])

    def by_cosine(
        self, model: SentenceTransformer, documents_ND: Tensor | None = None
    ) -> list[Ranking]:
        """The best `FUSED_DEPTH` documents of each query. Arguments as `score`."""
        if documents_ND is None:
            documents_ND = model.encode_document(
                list(self.documents.values()), convert_to_tensor=True, show_progress_bar=False
            )
        queries_QD = model.encode_query(
            self._evaluator.queries, convert_to_tensor=True, show_progress_bar=False
        )
        best = cos_sim(queries_QD.float().cpu(), documents_ND.float().cpu()).topk(
            min(FUSED_DEPTH, len(self.documents))
        )
        return self._named(best.indices.tolist(), best.values.tolist())

    def by_bm25(self, depth: int) -> list[Ranking]:
        """Lucene's variant, English stop words; only documents with a word of the query."""
        queries = bm25s.tokenize(self._evaluator.queries, stopwords="en", show_progress=False)
        places, scores = self._words.retrieve(
            queries, k=min(depth, len(self.documents)), show_progress=False
        )
        named = self._named(places.tolist(), scores.tolist())
        return [
            [(document, score) for document, score in ranking if score > 0] for ranking in named
        ]

    @cached_property
    def _words(self) -> bm25s.BM25:
        index = bm25s.BM25()
        index.index(
            bm25s.tokenize(list(self.documents.values()), stopwords="en", show_progress=False),
            show_progress=False,
        )
        return index

    def ndcg_of_each(self, rankings: Sequence[Ranking]) -> NDArray[np.float64]:
        """nDCG@10 of each query, (Q,): the score of a ranking is their mean."""
        found = []
        for name, ranking in zip(self.relevant, rankings, strict=True):
            right = self.relevant[name]
            gains = [1 / math.log2(2 + n) for n, (d, _) in enumerate(ranking[:DEPTH]) if d in right]
            best = sum(1 / math.log2(2 + n) for n in range(min(DEPTH, len(right))))
            found.append(sum(gains) / best)
        return np.array(found)

    def _named(
        self, places: Sequence[Sequence[int]], scores: Sequence[Sequence[float]]
    ) -> list[Ranking]:
        ids = list(self.documents)
        rows = zip(places, scores, strict=True)
        return [
            [(ids[place], score) for place, score in zip(row, values, strict=True)]
            for row, values in rows
        ]

    def _score_rankings(self, rankings: Sequence[Ranking]) -> Scores:
        results: list[Any] = [
            [{"corpus_id": name, "score": float(score)} for name, score in row[:DEPTH]]
            for row in rankings
        ]
        return _scores(self._evaluator.compute_metrics(results))


def fuse(rankings: Sequence[Ranking]) -> Ranking:
    """One ranking of several by reciprocal ranks, the best first; of equals the first named."""
    sums: dict[str, float] = defaultdict(float)
    for ranking in rankings:
        for rank, (name, _) in enumerate(ranking, 1):
            sums[name] += 1 / (FUSED_CONSTANT + rank)
    return sorted(sums.items(), key=lambda item: -item[1])


def _scores(metrics: dict[str, Any]) -> Scores:
    return Scores(float(metrics["ndcg@k"][DEPTH]), float(metrics["mrr@k"][DEPTH]))

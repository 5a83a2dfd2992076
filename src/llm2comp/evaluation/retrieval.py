"""Retrieval on a small collection: nDCG@10 and MRR@10 by sentence-transformers' own evaluator, for encoders and for BM25."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import bm25s
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import cos_sim
from torch import Tensor

DEPTH = 10


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

    def __init__(self, queries: Mapping[str, str], documents: Mapping[str, str], relevant: Mapping[str, set[str]]) -> None:
        self.documents = dict(documents)
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
        """Rank all documents by cosine; queries get the model's query prompt. `documents_ND`: embedded before, in order."""
        found: Any = self._evaluator.compute_metrices(model, corpus_embeddings=documents_ND)["cosine"]
        return _scores(found)

    def score_bm25(self) -> Scores:
        """Rank by BM25 (Lucene's variant, English stop words), the lexical reference."""
        index = bm25s.BM25()
        index.index(bm25s.tokenize(list(self.documents.values()), stopwords="en", show_progress=False), show_progress=False)
        queries = bm25s.tokenize(self._evaluator.queries, stopwords="en", show_progress=False)
        places, scores = index.retrieve(queries, k=min(DEPTH, len(self.documents)), show_progress=False)
        ids = list(self.documents)
        results: list[Any] = [
            [{"corpus_id": ids[int(p)], "score": float(s)} for p, s in zip(row, values, strict=True) if s > 0]
            for row, values in zip(places, scores, strict=True)
        ]
        return _scores(self._evaluator.compute_metrics(results))


def _scores(metrics: dict[str, Any]) -> Scores:
    return Scores(float(metrics["ndcg@k"][DEPTH]), float(metrics["mrr@k"][DEPTH]))

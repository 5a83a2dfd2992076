"""TF-IDF and BM25 as mteb encoders: the word-matching baseline that an encoder should beat."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from bm25s.stopwords import STOPWORDS_EN
from datasets import Dataset
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from llm2comp.errors import DataError

QUERIES_AT_ONCE = 256


class LexicalEncoder(AbsEncoder, abc.ABC):
    """Vectors of word weights.

    Only the vocabulary and word rarity are fitted, on each task's own texts.
    """

    batch_size = 1024
    name: str
    revision: str

    def __init__(self) -> None:
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"llm2comp/{self.name}", "revision": self.revision}
        )

    def fit_task(self, task: Any) -> None:
        """Fit vocabulary and word rarity on all texts of a loaded task.

        Raises DataError if no word is usable.
        """
        self._fit_words(texts_of(task), task.metadata.name)

    def encode(self, inputs: Any, **_: Any) -> NDArray[np.float32]:
        """Vectors of a data loader's texts, (N, vocabulary), float32; 0 where no word is known."""
        found: NDArray[np.float32] = self._weigh(
            [text for batch in inputs for text in batch["text"]]
        ).toarray()
        return found

    def _fit_words(self, texts: Iterable[str], where: str) -> None:
        try:
            self._fit(list(texts))
        except ValueError as error:
            raise DataError(f"no words to weigh: {error}", where=where) from None

    @abc.abstractmethod
    def _fit(self, texts: list[str]) -> None:
        """Raises ValueError when there is no word that counts."""

    @abc.abstractmethod
    def _weigh(self, texts: Sequence[str]) -> csr_matrix:
        """Weights of known words, (N, vocabulary)."""


class TfidfEncoder(LexicalEncoder):
    """Sublinear term frequency, English stop words, vectors of length 1."""

    name, revision = "tfidf", "sublinear-english-1"

    def _fit(self, texts: list[str]) -> None:
        self._vectorizer = TfidfVectorizer(
            sublinear_tf=True, stop_words="english", dtype=np.float32
        ).fit(texts)

    def _weigh(self, texts: Sequence[str]) -> csr_matrix:
        return self._vectorizer.transform(texts)


class Bm25Encoder(LexicalEncoder):
    """BM25 as Lucene has it: ranks documents for a query.

    Tokens, English stop words and defaults are bm25s's.

    Texts that are compared as equals (similarity, classes, clusters) get the vectors of these
    weights.
    """

    name, revision = "bm25", "lucene-english-1"
    k1, b = 1.5, 0.75

    def _fit(self, texts: list[str]) -> None:
        self._counter = CountVectorizer(stop_words=list(STOPWORDS_EN), dtype=np.float32)
        counts = self._counter.fit_transform(texts)
        have_V = np.bincount(counts.indices, minlength=counts.shape[1])
        self._rarity_V = np.log1p((len(texts) - have_V + 0.5) / (have_V + 0.5)).astype(np.float32)
        self._mean_length = float(counts.sum() / len(texts))

    def _weigh(self, texts: Sequence[str]) -> csr_matrix:
        counts = csr_matrix(self._counter.transform(texts))
        lengths_N = np.asarray(counts.sum(axis=1)).ravel() / self._mean_length
        damping = np.repeat(self.k1 * (1 - self.b + self.b * lengths_N), np.diff(counts.indptr))
        counts.data = (
            counts.data / (counts.data + damping) * self._rarity_V[counts.indices]
        ).astype(np.float32)
        return counts

    def index(self, corpus: Dataset, *, task_metadata: Any, **_: Any) -> None:
        """Index a retrieval task's documents (title and text), which alone give word rarity."""
        texts = [f"{row.get('title') or ''} {row['text']}" for row in corpus]
        self._fit_words(texts, task_metadata.name)
        self._ids, self._weights = list(corpus["id"]), self._weigh(texts)

    def search(
        self,
        queries: Dataset,
        *,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """Query id → its best documents and their scores.

        These are all its candidates, or else the documents that share a word with it.
        """
        places = {document: place for place, document in enumerate(self._ids)}
        names, counts = list(queries["id"]), self._counter.transform(queries["text"])
        found: dict[str, dict[str, float]] = {}
        for first in range(0, len(names), QUERIES_AT_ONCE):
            scores_QD = (counts[first : first + QUERIES_AT_ONCE] @ self._weights.T).toarray()
            for query, scores_D in zip(
                names[first : first + QUERIES_AT_ONCE], scores_QD, strict=True
            ):
                chosen = (
                    np.array([places[each] for each in top_ranked[query]])
                    if top_ranked
                    else np.flatnonzero(scores_D)
                )
                best = chosen[np.argsort(-scores_D[chosen], kind="stable")[:top_k]]
                found[query] = {self._ids[place]: float(scores_D[place]) for place in best}
        return found


# Models by name that need no training and no weights.
LEXICAL: Mapping[str, type[LexicalEncoder]] = {
    kind.name: kind for kind in (TfidfEncoder, Bm25Encoder)
}


def texts_of(task: Any) -> Iterator[str]:
    """Every text in a loaded task: columns of strings, lists of them, corpus and queries."""
    yield from _strings(
        task.dataset,
        skipped={"id", "_id", "label", "labels", "score", "relevant_docs", "top_ranked"},
    )


def _strings(value: Any, skipped: set[str]) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    # a document as mteb joins it
    elif isinstance(value, Dataset) and {"title", "text"} <= set(value.column_names):
        yield from (f"{row['title']} {row['text']}" for row in value)
    elif isinstance(value, Dataset):
        for column in value.column_names:
            if column not in skipped:
                yield from _strings(value[column], skipped)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in skipped:
                yield from _strings(part, skipped)
    elif isinstance(value, list | tuple) or type(value).__name__ == "Column":
        for part in value:
            yield from _strings(part, skipped)

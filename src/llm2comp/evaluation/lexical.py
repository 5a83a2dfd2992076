"""TF-IDF as an encoder of mteb's: the lexical floor that any learned encoder has to rise above."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from datasets import Dataset
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from llm2comp.errors import DataError

NAME, REVISION = "llm2comp/tfidf", "sublinear-english-1"


class TfidfEncoder(AbsEncoder):
    """Sublinear term frequency, English stop words; vocabulary and document frequencies from the texts of the task itself."""

    batch_size = 1024

    def __init__(self) -> None:
        self.mteb_model_meta = ModelMeta.create_empty({"name": NAME, "revision": REVISION})
        self._vectorizer: TfidfVectorizer | None = None

    def fit_task(self, task: Any) -> None:
        """Take the vocabulary from all texts of a loaded task. Raises DataError when it has no word that counts."""
        try:
            self._vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english", dtype=np.float32).fit(texts_of(task))
        except ValueError as error:
            raise DataError(f"no words to weigh: {error}", where=task.metadata.name) from None

    def encode(self, inputs: Any, **_: Any) -> NDArray[np.float32]:
        """Vectors of a data loader's texts, (N, vocabulary), float32, of length 1 (0 for a text without known words)."""
        assert self._vectorizer is not None, "fit_task comes first"
        found: NDArray[np.float32] = self._vectorizer.transform([text for batch in inputs for text in batch["text"]]).toarray()
        return found


def texts_of(task: Any) -> Iterator[str]:
    """Every text in a loaded task, whatever its layout: columns of strings, lists of them, corpus and queries."""
    yield from _strings(task.dataset, skipped={"id", "_id", "label", "labels", "score", "relevant_docs", "top_ranked"})


def _strings(value: Any, skipped: set[str]) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Dataset) and {"title", "text"} <= set(value.column_names):  # a document as mteb joins it
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

"""Values of a row: its texts and numbers, or the reason why the row is unusable."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llm2comp.data.tables import Row
from llm2comp.system.files import is_unicode


class UnusableError(Exception):
    """A row to leave out; says why."""


class WrittenListError(Exception):
    """A column holds lists written as strings, so no row of the source can be taken as one text."""


def filled(row: Row, column: str) -> str:
    """Get the one text in a column."""
    if column not in row:
        raise UnusableError(f"no column {column!r}")
    if isinstance(row[column], list):
        raise UnusableError(f"{column!r} is not a string")
    text = next(_texts(row, column))
    if not text.strip():
        raise UnusableError("empty")
    return text


def vector(row: Row, column: str) -> NDArray[np.float32]:
    """Get the numbers in a column."""
    try:
        vector_D = np.asarray(row.get(column), dtype=np.float32)
    except (TypeError, ValueError):
        vector_D = np.empty(0, dtype=np.float32)
    if vector_D.ndim != 1 or not vector_D.size or not np.isfinite(vector_D).all():
        raise UnusableError(f"{column!r} is not a list of numbers")
    return vector_D


def _texts(row: Row, column: str) -> Iterator[str]:
    """Texts in a column, which holds one or a list; null counts as an empty text."""
    value = row.get(column)
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str | None):
            raise UnusableError(f"{column!r} is not a string")
        if not is_unicode(text or ""):
            raise UnusableError("not UTF-8")
        yield text or ""


def one_text(row: Row, column: str) -> list[str]:
    """The same, as a row's only item."""
    return [filled(row, column)]


def stripped(row: Row, column: str) -> list[str]:
    """The distinct texts in a column, stripped; empty ones are dropped."""
    texts = [text.strip() for text in _texts(row, column)]
    if written := next((text for text in texts if _is_written_list(text)), None):
        raise WrittenListError(f"{column}: {written}")
    return [text for text in dict.fromkeys(texts) if text]


def _is_written_list(text: str) -> bool:
    """Whether a text is Python or JSON source of a list of texts, as lists look after a CSV."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        return (
            isinstance(found, list)
            and bool(found)
            and all(isinstance(item, str | None) for item in found)
        )
    return False

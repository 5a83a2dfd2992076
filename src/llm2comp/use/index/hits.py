"""What a search finds: a passage, why it was found, and a few of its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llm2comp.errors import DataError
from llm2comp.system.files import is_unicode

# The constant of reciprocal rank fusion (Cormack et al. 2009): 1 / (60 + rank) of each list.
_CONSTANT = 60
_SNIPPET = 240


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Args:
        path: its file.
        first, last: its lines (of a PDF pages, of a .docx paragraphs).
        headings: those above it, the outermost first.
        text: the passage.
        score: reciprocal ranks, cosine or BM25, by the mode of the search; higher is better.
        matched: the words of the passage whose stems are in the question.
    """

    path: str
    first: int
    last: int
    headings: tuple[str, ...]
    text: str
    score: float
    matched: tuple[str, ...]

    @property
    def heading(self) -> str:
        """The headings as one line."""
        return " > ".join(self.headings)

    @property
    def snippet(self) -> str:
        """The part of the passage with the most matched words, as one line."""
        text = " ".join(self.text.split())
        if len(text) <= _SNIPPET:
            return text
        places = [match.start() for match in self._matches(text)]
        starts = [0, *(max(0, place - _SNIPPET // 6) for place in places)]

        def inside(start: int) -> int:
            within = {place for place in places if start <= place < start + _SNIPPET}
            return len({text[place : place + 12] for place in within})

        start = max(starts, key=lambda start: (inside(start), -start))
        start = text.find(" ", start - 1) + 1 if start else 0
        end = start + _SNIPPET
        cut = text[start:end] if end >= len(text) else text[start:end].rpartition(" ")[0]
        return f"{'… ' * bool(start)}{cut}{' …' * (end < len(text))}"

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where matched words stand in a text such as the snippet."""
        return [match.span() for match in self._matches(text)]

    def _matches(self, text: str) -> Sequence[re.Match[str]]:
        if not self.matched:
            return []
        words = "|".join(map(re.escape, self.matched))
        return list(re.finditer(rf"(?<![^\W_])(?:{words})(?![^\W_])", text))


def check_question(text: str, k: int, path: str | None) -> None:
    """Raise DataError for a question that cannot be asked."""
    if not text.strip() or k < 1:
        raise DataError("nothing to search for", expected="a question, and k of 1 or more")
    for where, given in (("question", text), ("path", path or "")):
        if not is_unicode(given):
            raise DataError("not a Unicode text", where=where, found=ascii(given)[:80])


def fused(rankings: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """Several rankings as one by reciprocal rank; the best first."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, (number, _) in enumerate(ranking, 1):
            scores[number] = scores.get(number, 0.0) + 1 / (_CONSTANT + rank)
    return sorted(scores.items(), key=lambda item: -item[1])


def words_of(text: str) -> set[str]:
    """The words of a text as they are written; `_` parts words, as the full-text index does."""
    return set(re.findall(r"[^\W_]+", text))

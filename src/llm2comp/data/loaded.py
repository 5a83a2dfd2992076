"""What is read from a source: pairs, texts with responses, and counts of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from llm2comp.data.tables import file_kind

T = TypeVar("T")


# How many of the rows left out for one reason are named.
_NAMED = 5


@dataclass(frozen=True)
class Pair:
    """A query, the text to be found, and texts that look right but are not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Response:
    """A text, an LM's response to it and, if asked for, the response's embedding.

    The embedding is a teacher's, (D_t,) float32.
    """

    text: str
    response: str
    teacher_D: NDArray[np.float32] | None = None


@dataclass
class Tally:
    """Counts of what was read: all rows, used rows, left-out rows by reason with line numbers."""

    source: str
    there: int = 0
    used: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many rows, how many left out and why."""
        return f"{_shown(self.source)}: {self.used:,} rows" + (
            f"; left out: {self.left_out()}" if self.skipped else ""
        )

    def left_out(self) -> str:
        """`12 empty (line 3, line 9, ...), 1 malformed JSON (line 17)`."""
        return ", ".join(
            f"{count:,} {reason} ({', '.join(self.places[reason])}{', ...' * (count > _NAMED)})"
            for reason, count in self.skipped.items()
        )

    def leave_out(self, reason: str, place: str) -> None:
        """Count a row that is not used."""
        self.skipped[reason] += 1
        named = self.places.setdefault(reason, [])
        if len(named) < _NAMED:
            named.append(place)


@dataclass
class Loaded(Tally, Generic[T]):
    """Everything read from a source, in memory.

    `numbers`: the row of the source, from 0, that each of `rows` comes from. `fingerprint`: sha256
    (hex) over their content.
    """

    rows: list[T] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    fingerprint: str = ""

    def summary(self) -> str:
        """As of any tally; and how many items, where a row may give several."""
        told = super().summary()
        return told if len(self.rows) == self.used else f"{told}; {len(self.rows):,} pairs"


def _shown(source: str) -> str:
    """A source's name in messages: of a file without its folders."""
    return Path(source).name if file_kind(Path(source)) else source

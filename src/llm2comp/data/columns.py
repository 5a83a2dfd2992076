"""Columns of a table: does each wanted one exist once, and if not, which were meant?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import yaml

from llm2comp.errors import DataError

Columns: TypeAlias = tuple[str, ...]

# What others call a column of that role, the likeliest first.
_NAMES = {
    "column": "text texts content body sentence passage document paragraph abstract description "
    "sentence1 title",
    "response": "response responses answer output completion",
    "anchor": "anchor query queries question questions q search sentence1 text1 premise title "
    "instruction prompt input",
    "positive": "positive pos answer answers response passage document doc context sentence2 "
    "text2 output body content text a",
    "negatives": "negatives negative neg hard_negatives hard_negative negs",
}
_NO_TEXT = (
    "id",
    "_id",
    "idx",
    "index",
    "row",
    "label",
    "labels",
    "score",
    "url",
    "date",
    "source",
    "split",
    "lang",
    "language",
)


class MissingColumnError(DataError):
    """A missing column; `names` are the columns that exist."""

    def __init__(
        self, column: str, source: str, names: Sequence[str], fix: str | None = None
    ) -> None:
        self.column, self.source, self.names = column, source, tuple(names)
        found = f"columns {', '.join(names[:30])}"
        super().__init__(
            f"no column {column!r}", where=source, found=found, fix=fix or _alike(column, names)
        )

    def advised(self, fix: str | None) -> MissingColumnError:
        """The same with what to do."""
        return MissingColumnError(self.column, self.source, self.names, fix)


def check_columns(source: str, wanted: Columns, found: Iterable[str]) -> None:
    """Raise DataError unless every wanted column exists exactly once.

    It is a MissingColumnError if one is missing.
    """
    names = [str(name) for name in found]
    for column in wanted:
        places = [str(place) for place, name in enumerate(names, 1) if name == column]
        if not places:
            raise MissingColumnError(column, source, names)
        if len(places) > 1:
            raise DataError(
                f"{len(places)} columns are called {column!r}",
                where=source,
                expected="one",
                found=f"columns {' and '.join(places)} of {len(names)}",
                fix="rename all but one of them",
            )


def likely(role: str, names: Sequence[str], asked: str = "") -> str | None:
    """The column most likely meant: by spelling, by usual names, else the first suitable one."""
    if near := difflib.get_close_matches(asked, names, n=1, cutoff=0.75):
        return near[0]
    others = suitable(names) or names
    return usual(role, names) or (others[0] if others and role != "negatives" else None)


def usual(role: str, names: Sequence[str]) -> str | None:
    """The column with a name that is usual for that role."""
    by_name = {name.strip().lower(): name for name in reversed(names)}
    return next((by_name[name] for name in _NAMES[role].split() if name in by_name), None)


def suitable(names: Iterable[str]) -> list[str]:
    """The columns that may hold texts: no ids, labels, dates, ..."""
    return [name for name in names if name.strip().lower() not in _NO_TEXT]


def settings_for(asked: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """A source as a recipe line, with missing columns replaced by columns that the file has.

    `asked`: `source`, and role → column (of negatives: columns). None where the file has too few
    columns.
    """
    free = [name for name in names if name not in asked.values()]
    found: dict[str, Any] = {"source": asked["source"]}
    for role, column in asked.items():
        if role == "source":
            continue
        if role == "negatives":
            kept = [name for name in column if name in names] or [
                name for name in [likely(role, free)] if name
            ]
            found |= {role: kept} if kept else {}
            continue
        name = column if column in names else likely(role, free, column)
        if name is None:
            return None
        free = [other for other in free if other != name]
        found[role] = name
    return str(
        yaml.safe_dump(
            found, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True
        )
    ).strip()


def _alike(column: str, names: Sequence[str]) -> str | None:
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.75)
    return f"did you mean {near[0]!r}?" if near else None

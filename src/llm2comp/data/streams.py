"""Many sources as one stream of numbered rows, for work that is larger than memory.

    inputs (globs) → sources → rows 0, 1, 2, ... over all of them → shards of so many rows

The stream is read twice: a survey counts the rows, names those without a text and takes their
digest; then the shards are made. Memory holds one shard, or of parquet a row group.
"""

from __future__ import annotations

import glob
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2comp.data.loaded import Tally
from llm2comp.data.sources import check_sources, items_of
from llm2comp.data.tables import Row, file_rows
from llm2comp.data.values import UnusableError, filled
from llm2comp.errors import DataError
from llm2comp.recipe import TextData
from llm2comp.system.files import is_unicode, to_json


@dataclass(frozen=True)
class TextRow:
    """A row that has a text. `number` counts all rows from 0, `kept` are values of other columns.

    A kept value is a text as it is, null, or anything else in JSON.
    """

    number: int
    text: str
    kept: tuple[str | None, ...]


@dataclass(frozen=True)
class Survey:
    """What a stream holds: `rows` of it, `texts` among them, and a digest of these (sha256, hex).

    `left_out` says which rows have no text, `line` all of it; `sample` are some of the texts.
    """

    rows: int
    texts: int
    digest: str
    left_out: str
    line: str
    sample: tuple[str, ...]


def sources_of(inputs: Sequence[str | Path]) -> tuple[str, ...]:
    """The files that patterns stand for, sorted; any other input as it is.

    Raises:
        DataError: nothing given; a pattern that no file matches; a file that is not there, or of a
            kind that is not read.
    """
    found: list[str] = []
    for given in map(str, inputs):
        pattern = str(Path(given).expanduser())
        if not glob.has_magic(given) or Path(pattern).exists():
            found.append(given)
            continue
        matches = glob.glob(pattern, recursive=True)  # noqa: PTH207 patterns may be absolute
        files = sorted(file for file in matches if Path(file).is_file())
        if not files:
            raise DataError("no file matches", where=given, fix="check the pattern")
        found += files
    if not found:
        raise DataError("nothing to read", expected="a file, a pattern or a Hub data set")
    check_sources(TextData(source=source) for source in found)
    for path in (Path(source).expanduser() for source in found):
        if path.is_file():
            file_rows(path, ("text",))
    return tuple(found)


@dataclass(frozen=True)
class Stream:
    """Rows of `sources`, one after the other: the text in `column`, and the columns to `keep`."""

    sources: tuple[str, ...]
    column: str = "text"
    keep: tuple[str, ...] = ()

    def rows(self, tallies: list[Tally] | None = None) -> Iterator[TextRow]:
        """Rows that have a text, in order; a tally of each source is added to `tallies`.

        Raises:
            DataError: a source that cannot be read, lacks a column or has no usable row.
        """
        begin = 0

        def values(row: Row) -> list[tuple[str, tuple[str | None, ...]]]:
            return [(filled(row, self.column), tuple(_as_text(row, key) for key in self.keep))]

        columns = tuple(dict.fromkeys((self.column, *self.keep)))
        for source in self.sources:
            tally = Tally(source)
            for text, kept in items_of(
                TextData(source=source, column=self.column), columns, values, tally
            ):
                yield TextRow(begin + tally.there - 1, text, kept)
            begin += tally.there
            if tallies is not None:
                tallies.append(tally)

    def survey(self, sample: int = 0, seed: int = 0) -> Survey:
        """Read all rows once; `sample` texts are drawn, each with the same chance.

        Errors as `rows`.
        """
        tallies: list[Tally] = []
        digest, drawn, draw = hashlib.sha256(), list[str](), random.Random(seed)
        for count, row in enumerate(self.rows(tallies)):
            digest.update(to_json([row.number, row.text, row.kept]).encode() + b"\n")
            if len(drawn) < sample:
                drawn.append(row.text)
            elif (place := draw.randrange(count + 1)) < sample:  # algorithm R
                drawn[place] = row.text
        whole = _together(tallies)
        return Survey(
            whole.there,
            whole.used,
            digest.hexdigest(),
            whole.left_out(),
            whole.summary(),
            tuple(drawn),
        )

    def shards(self, size: int) -> Shards:
        """The rows by shards of `size`."""
        return Shards(self, size)


class Shards:
    """A stream by shards: shard i has rows i·size to (i+1)·size - 1, as far as they have a text.

    Asked for in rising order all shards cost one reading; an earlier one begins it anew.
    """

    def __init__(self, stream: Stream, size: int) -> None:
        self._stream, self._size = stream, size
        self._rows = stream.rows()
        self._held: TextRow | None = None  # the first row of a later shard
        self._next = 0

    def __getitem__(self, shard: int) -> list[TextRow]:
        if shard < self._next:
            self._rows, self._held = self._stream.rows(), None
        self._next = shard + 1
        begin, end = shard * self._size, (shard + 1) * self._size
        found: list[TextRow] = []
        row = self._held or next(self._rows, None)
        while row is not None and row.number < end:
            if row.number >= begin:
                found.append(row)
            row = next(self._rows, None)
        self._held = row
        return found


def _as_text(row: Row, column: str) -> str | None:
    value = row.get(column)
    text = value if value is None or isinstance(value, str) else to_json(value, default=str)
    if not is_unicode(text or ""):
        raise UnusableError(f"{column!r} is not UTF-8")
    return text


def _together(tallies: Sequence[Tally]) -> Tally:
    """One tally of all sources; of several, a place also says which."""
    if len(tallies) == 1:
        return tallies[0]
    whole = Tally(f"{len(tallies):,} sources")
    for tally in tallies:
        whole.there, whole.used = whole.there + tally.there, whole.used + tally.used
        for reason, count in tally.skipped.items():
            for place in tally.places[reason]:
                whole.leave_out(reason, f"{Path(tally.source).name} {place}")
            whole.skipped[reason] += count - len(tally.places[reason])
    return whole

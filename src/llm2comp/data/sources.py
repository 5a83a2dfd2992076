"""Where texts and pairs come from: files, Hub data sets, and the documentation that Python carries.

    source → rows {column: value}, or the reason why a row is unusable → texts or pairs, with counts

A bad row never ends a run: it is left out and counted by reason. What makes a whole source useless (no such file or column, a
broken archive, no usable row) is a DataError. Nothing that is read gets executed: no pickles, no scripts of data sets.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from llm2comp.data import python_docs
from llm2comp.errors import DataError
from llm2comp.recipe import PairData, TextData

T = TypeVar("T")
Spec: TypeAlias = TextData | PairData
Columns: TypeAlias = tuple[str, ...]
Row: TypeAlias = dict[str, Any]
Rows: TypeAlias = Iterator[tuple[str, Row | str]]  # (place, row), or (place, reason why there is none)

_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_HUB_ADVICE = "check name and split; `hf auth login` for a gated set; HF_HUB_OFFLINE=1 finds only sets in the cache"


@dataclass(frozen=True)
class Pair:
    """A query, the text to be found, and texts that look right but are not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """What a source gave, and how many rows it did not give, by reason.

    `fingerprint` is the sha256 (hex) over the rows' content; `first_at` says for each reason where it was first met.
    """

    rows: list[T]
    skipped: Counter[str]
    source: str
    fingerprint: str
    first_at: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many rows, how many left out and why."""
        name = Path(self.source).name if _kind(Path(self.source)) else self.source
        return f"{name}: {len(self.rows):,} rows" + (f"; left out: {self.left_out()}" if self.skipped else "")

    def left_out(self) -> str:
        """`12 empty, 5 malformed JSON (first at line 17)`."""
        return ", ".join(
            f"{count:,} {reason}" + (f" (first at {self.first_at[reason]})" if reason != "empty" else "")
            for reason, count in self.skipped.items()
        )


class _UnusableError(Exception):
    """A row to leave out; says why."""


def read_texts(spec: TextData) -> Loaded[str]:
    """Read the texts of a source. Raises DataError when there is no such file or column, or no usable text."""
    return _collect(spec, (spec.column,), lambda row: _filled(row, spec.column), lambda text: [text])


def read_pairs(spec: PairData) -> Loaded[Pair]:
    """Read the training pairs of a source. Raises DataError when there is no such file or column, or no usable pair."""

    def pair(row: Row) -> Pair:
        anchor, positive = _filled(row, spec.anchor), _filled(row, spec.positive)
        if anchor.strip() == positive.strip():
            raise _UnusableError("positive equals query")
        found = [text for column in spec.negatives for text in _texts(row, column)]
        return Pair(anchor, positive, tuple(text for text in found if text.strip() not in ("", positive.strip())))

    columns = (spec.anchor, spec.positive, *spec.negatives)
    return _collect(spec, columns, pair, lambda pair: [pair.anchor, pair.positive, *pair.negatives])


def _collect(spec: Spec, columns: Columns, make: Callable[[Row], T], parts: Callable[[T], list[str]]) -> Loaded[T]:
    """Make an item of each row until the limit; count the rows that are none. `parts` are the strings of an item."""
    loaded: Loaded[T] = Loaded([], Counter(), spec.source, "")
    columns_seen: dict[str, None] = {}
    digest = hashlib.sha256()
    for place, row in _rows(spec, columns):
        try:
            if isinstance(row, str):
                raise _UnusableError(row)
            columns_seen |= dict.fromkeys(row)
            loaded.rows.append(make(row))
        except _UnusableError as reason:
            loaded.skipped[str(reason)] += 1
            loaded.first_at.setdefault(str(reason), place)
            continue
        digest.update(json.dumps(parts(loaded.rows[-1])).encode() + b"\n")
        if len(loaded.rows) == spec.limit:
            break
    if columns_seen:
        _check_columns(spec.source, columns, columns_seen)
    if not loaded.rows:
        raise DataError("no usable row", where=spec.source, found=loaded.left_out() or "nothing in it")
    return Loaded(loaded.rows, loaded.skipped, spec.source, digest.hexdigest(), loaded.first_at)


def _filled(row: Row, column: str) -> str:
    """Get the one text in a column."""
    if column not in row:
        raise _UnusableError(f"no column {column!r}")
    if isinstance(row[column], list):
        raise _UnusableError(f"{column!r} is not a string")
    text = next(_texts(row, column))
    if not text.strip():
        raise _UnusableError("empty")
    return text


def _texts(row: Row, column: str) -> Iterator[str]:
    """Texts in a column, which holds one or a list; null counts as an empty text."""
    value = row.get(column)
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str | None):
            raise _UnusableError(f"{column!r} is not a string")
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError:  # lone surrogates: an escape in JSON, or a byte that did not decode
            raise _UnusableError("not UTF-8") from None
        yield text or ""


def _rows(spec: Spec, columns: Columns) -> Rows:
    """Rows behind a source name, whatever it stands for. What a disk or an archive throws becomes a DataError."""
    path = Path(spec.source).expanduser()
    try:
        if spec.source.startswith("builtin:"):
            yield from _builtin_rows(spec.source, columns)
        elif path.exists():
            yield from _file_rows(path, columns)
        elif _kind(path) or not _HUB_NAME.fullmatch(spec.source):
            raise _no_such_file(path.absolute())
        else:
            yield from _hub_rows(spec, columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", where=spec.source, fix="check that the file is whole") from error


def _builtin_rows(source: str, columns: Columns) -> Rows:
    if source != "builtin:python-docs":
        raise DataError("no such builtin", where=source, expected="builtin:python-docs")
    items = [(text,) for text in python_docs.passages()] if len(columns) == 1 else python_docs.pairs(heldout=False)
    for number, item in enumerate(items, 1):
        yield f"item {number}", dict(zip(columns, item, strict=False))


def _hub_rows(spec: Spec, columns: Columns) -> Rows:
    try:
        import datasets

        table = datasets.load_dataset(spec.source, spec.subset, split=spec.split, revision=spec.revision)
    except Exception as error:  # the library raises some twenty kinds
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise DataError(f"not a file, nor a loadable Hub data set: {cause}", where=spec.source, fix=_HUB_ADVICE) from error
    _check_columns(spec.source, columns, table.column_names)
    for number, row in enumerate(table.select_columns(list(dict.fromkeys(columns))), 1):
        yield f"row {number}", row


def _file_rows(path: Path, columns: Columns) -> Rows:
    if path.is_dir() or (kind := _kind(path)) is None:
        problem = "a folder, not a file" if path.is_dir() else "a kind of file that is not read"
        raise DataError(problem, where=str(path), expected=f"{', '.join(_KINDS)}; all but parquet also with .gz or .zst")
    readers = (_json_line_rows, _json_rows, _table_rows, _table_rows, _parquet_rows, _line_rows)
    return readers[_KINDS.index(kind)](path, columns)


def _json_line_rows(path: Path, columns: Columns) -> Rows:
    for number, line in enumerate(_lines(path), 1):
        yield f"line {number}", _json_row(line)


def _json_row(line: bytes) -> Row | str:
    if not line.strip():
        return "empty"
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError):
        return "malformed JSON"
    return value if isinstance(value, dict) else "not a JSON object"


def _json_rows(path: Path, columns: Columns) -> Rows:
    """One array of objects, or JSON lines."""
    if not next((line for line in _lines(path) if line.strip()), b"").lstrip().startswith(b"["):
        yield from _json_line_rows(path, columns)
        return
    try:
        values = json.loads(b"".join(_lines(path)).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a JSON array: {error}", where=str(path), fix="write one JSON object per line instead") from error
    for number, value in enumerate(values, 1):
        yield f"item {number}", value if isinstance(value, dict) else "not a JSON object"


def _table_rows(path: Path, columns: Columns) -> Rows:
    """Comma- or tab-separated with a header; quotes as in RFC 4180."""
    csv.field_size_limit(2**31 - 1)
    lines = (line.decode("utf-8", "surrogateescape") for line in _lines(path))
    reader = csv.reader(lines, delimiter="\t" if _kind(path) == ".tsv" else ",", strict=True)
    header: list[str] = []
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            if not header or "unexpected end" in str(error):  # an open quote has swallowed the rest of the file
                raise DataError(f"not a table from {place} on: {error}", where=str(path), fix='write " as ""') from None
            yield place, "malformed CSV"
            continue
        if values is None:
            return
        if not any(value.strip() for value in values):
            yield place, "empty"
        elif not header:
            header = values
            _check_columns(str(path), columns, header)
        else:
            yield place, dict(zip(header, values, strict=True)) if len(values) == len(header) else "wrong number of columns"


def _parquet_rows(path: Path, columns: Columns) -> Rows:
    number = 0
    with pq.ParquetFile(path) as file:
        _check_columns(str(path), columns, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1024, columns=list(dict.fromkeys(columns))):
            for index in range(len(batch)):
                number += 1
                try:
                    yield f"row {number}", {column: batch[column][index].as_py() for column in columns}
                except UnicodeDecodeError:
                    yield f"row {number}", "not UTF-8"


def _line_rows(path: Path, columns: Columns) -> Rows:
    if len(columns) > 1:
        raise DataError("a .txt file has no columns, pairs need some", where=str(path), fix="use .jsonl, .csv or .parquet")
    for number, line in enumerate(_lines(path), 1):
        yield f"line {number}", {columns[0]: line.decode("utf-8", "surrogateescape").rstrip("\r\n")}


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a plain or compressed file, split at line feeds, without a byte order mark."""
    with io.BufferedReader(pa.input_stream(str(path), compression=_COMPRESSIONS.get(path.suffix.lower()))) as stream:
        for number, line in enumerate(stream):
            yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _kind(path: Path) -> str | None:
    """`.jsonl` for x.jsonl and x.JSONL.gz; None for a name that is of no kind we read."""
    *_, inner, last = ("", "", *path.suffixes)
    kind = inner if last.lower() in _COMPRESSIONS and inner.lower() != ".parquet" else last
    return kind.lower() if kind.lower() in _KINDS else None


def _check_columns(source: str, wanted: Columns, found: Iterable[str]) -> None:
    names = [str(name) for name in found]
    for column in wanted:
        if column not in names:
            nearest = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
            fix = f"did you mean {nearest[0]!r}?" if nearest else None
            raise DataError(f"no column {column!r}", where=source, found=f"columns {', '.join(names[:30])}", fix=fix)


def _no_such_file(path: Path) -> DataError:
    folder = next(parent for parent in path.parents if parent.is_dir())
    if folder != path.parent:
        return DataError("no such file", where=str(path), found=f"the path exists up to {folder}")
    nearest = difflib.get_close_matches(path.name, [file.name for file in folder.iterdir() if _kind(file)], n=1, cutoff=0.0)
    return DataError("no such file", where=str(path), fix=f"did you mean {nearest[0]!r}?" if nearest else None)

"""One file → rows {column: value}, or the reason why a row is unusable. Formats by suffix, plain or compressed.

A bad row never ends the reading; a file that is no such table, or whose archive is broken, does.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from llm2comp.errors import DataError

Columns: TypeAlias = tuple[str, ...]
Row: TypeAlias = dict[str, Any]
Rows: TypeAlias = Iterator[tuple[str, Row | str]]  # (place, row), or (place, reason why there is none)

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def file_rows(path: Path, columns: Columns) -> Rows:
    """Rows of one file, read by its suffix. Raises DataError for a folder, an unknown suffix, or missing columns."""
    if path.is_dir() or (kind := file_kind(path)) is None:
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
    reader = csv.reader(lines, delimiter="\t" if file_kind(path) == ".tsv" else ",", strict=True)
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
            check_columns(str(path), columns, header)
        else:
            yield place, dict(zip(header, values, strict=True)) if len(values) == len(header) else "wrong number of columns"


def _parquet_rows(path: Path, columns: Columns) -> Rows:
    number = 0
    with pq.ParquetFile(path) as file:
        check_columns(str(path), columns, file.schema_arrow.names)
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


def file_kind(path: Path) -> str | None:
    """`.jsonl` for x.jsonl and x.JSONL.gz; None for a name that is of no kind we read."""
    *_, inner, last = ("", "", *path.suffixes)
    kind = inner if last.lower() in _COMPRESSIONS and inner.lower() != ".parquet" else last
    return kind.lower() if kind.lower() in _KINDS else None


def check_columns(source: str, wanted: Columns, found: Iterable[str]) -> None:
    """Raise DataError, with the nearest name, unless all wanted columns are found."""
    names = [str(name) for name in found]
    for column in wanted:
        if column not in names:
            nearest = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
            fix = f"did you mean {nearest[0]!r}?" if nearest else None
            raise DataError(f"no column {column!r}", where=source, found=f"columns {', '.join(names[:30])}", fix=fix)


def no_such_file(path: Path) -> DataError:
    """The error for a missing file: how far the path exists, or the nearest file beside it."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    if folder != path.parent:
        return DataError("no such file", where=str(path), found=f"the path exists up to {folder}")
    nearest = difflib.get_close_matches(path.name, [file.name for file in folder.iterdir() if file_kind(file)], n=1, cutoff=0.0)
    return DataError("no such file", where=str(path), fix=f"did you mean {nearest[0]!r}?" if nearest else None)

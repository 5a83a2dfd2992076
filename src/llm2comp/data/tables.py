"""One file → rows {column: value}, or the reason why a row is unusable.

Formats by suffix, plain or compressed.

A bad row never ends the reading; a file that is no such table, whose archive is broken, or whose
encoding is not known, does.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import io
import json
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from llm2comp.data.columns import Columns, check_columns
from llm2comp.errors import DataError
from llm2comp.system.files import is_unicode

Row: TypeAlias = dict[str, Any]
# (place, row), or (place, reason why there is none)
Rows: TypeAlias = Iterator[tuple[str, Row | str]]

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# Byte order marks, the longer first: that of UTF-16 begins as that of UTF-32 does.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_UNPACK = {".gz": "gzip -dc", ".zst": "zstd -dc"}
_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def file_rows(path: Path, columns: Columns) -> Rows:
    """Rows of one file, read by its suffix.

    Raises DataError for a folder, an unknown suffix, or missing columns.
    """
    if path.is_dir() or (kind := file_kind(path)) is None:
        problem = "a folder, not a file" if path.is_dir() else "a kind of file that is not read"
        raise DataError(
            problem,
            where=str(path),
            expected=f"{', '.join(_KINDS)}; all but parquet also with .gz or .zst",
        )
    readers = (_json_rows, _json_rows, _table_rows, _table_rows, _parquet_rows, _line_rows)
    return readers[_KINDS.index(kind)](path, columns)


def _json_rows(path: Path, columns: Columns) -> Rows:
    """JSON lines, or one array of objects, whichever the file's name says."""
    if next((line for line in file_lines(path) if line.strip()), "").lstrip().startswith("["):
        try:
            values = json.loads("".join(file_lines(path)), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            if file_kind(path) == ".json":
                fix = "write one JSON object per line instead"
                raise DataError(f"not a JSON array: {error}", where=str(path), fix=fix) from error
        else:
            for number, value in enumerate(values, 1):
                yield f"item {number}", _json_row(value, columns)
            return
    for number, line in enumerate(file_lines(path), 1):
        yield f"line {number}", _json_line(line, columns)


def _json_line(line: str, columns: Columns) -> Row | str:
    if not line.strip():
        return "empty"
    if not is_unicode(line):
        return "not UTF-8"
    try:
        return _json_row(json.loads(line, object_pairs_hook=_object), columns)
    except (ValueError, RecursionError):
        return "malformed JSON"


class _Twice(dict[str, Any]):
    """Marks a JSON object with a repeated key."""

    keys_twice: tuple[str, ...] = ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        found = _Twice(found)
        found.keys_twice = tuple(
            key for key, count in Counter(key for key, _ in pairs).items() if count > 1
        )
    return found


def _json_row(value: Any, columns: Columns) -> Row | str:
    if not isinstance(value, dict):
        return "not a JSON object"
    twice = next(
        (key for key in columns if isinstance(value, _Twice) and key in value.keys_twice), None
    )
    return value if twice is None else f"key {twice!r} twice"


def _table_rows(path: Path, columns: Columns) -> Rows:
    """Comma- or tab-separated with a header; quotes as in RFC 4180."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(
        file_lines(path), delimiter="\t" if file_kind(path) == ".tsv" else ",", strict=True
    )
    header: list[str] = []
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            # an open quote has swallowed the rest of the file
            if not header or "unexpected end" in str(error):
                raise DataError(
                    f"not a table from {place} on: {error}", where=str(path), fix='write " as ""'
                ) from None
            yield place, "malformed CSV"
            continue
        if values is None:
            return
        if not header and any(value.strip() for value in values):
            header = values
            _refuse_separator(path, columns, header)
            check_columns(str(path), columns, header)
        elif not header:
            continue
        elif not any(value.strip() for value in values):
            yield place, "empty"
        else:
            yield (
                place,
                dict(zip(header, values, strict=True))
                if len(values) == len(header)
                else "wrong number of columns",
            )


def _refuse_separator(path: Path, columns: Columns, header: list[str]) -> None:
    """Raise DataError if a table's separator is not the one its name implies."""
    other = next((mark for mark in ("\t", ";", "|", ",") if mark in header[0]), None)
    if len(header) == 1 and other and header[0] not in columns:
        fix = (
            "name it .tsv"
            if other == "\t"
            else "name it .csv"
            if other == ","
            else "save it with commas (.csv) or tabs (.tsv)"
        )
        raise DataError(
            f"its columns are parted by {other!r}",
            where=f"{path}, header",
            found=header[0][:80],
            fix=fix,
        )


def _parquet_rows(path: Path, columns: Columns) -> Rows:
    number = 0
    with pq.ParquetFile(path) as file:
        check_columns(str(path), columns, file.schema_arrow.names)
        for batch in file.iter_batches(batch_size=1024, columns=list(dict.fromkeys(columns))):
            for index in range(len(batch)):
                number += 1
                try:
                    yield (
                        f"row {number}",
                        {column: batch[column][index].as_py() for column in columns},
                    )
                except UnicodeDecodeError:
                    yield f"row {number}", "not UTF-8"


def _line_rows(path: Path, columns: Columns) -> Rows:
    if len(columns) > 1:
        raise DataError(
            "a .txt file has no columns: a line is a text",
            where=str(path),
            fix="use .jsonl, .csv or .parquet",
        )
    for number, line in enumerate(file_lines(path), 1):
        yield f"line {number}", {columns[0]: line.rstrip("\r\n")}


def file_lines(path: Path) -> Iterator[str]:
    """Lines of a plain or compressed file with their ends: LF, CR LF or CR.

    Blank ones at the file's end are none.

    UTF-8, or what a byte order mark says; bytes that are not UTF-8 become lone surrogates.

    Raises:
        DataError: NUL bytes, as in UTF-16 without a mark; a file that is not in the encoding of its
            mark.
    """
    with io.BufferedReader(
        pa.input_stream(str(path), compression=_COMPRESSIONS.get(path.suffix.lower()))
    ) as stream:
        head = stream.peek(64)[:64]
        encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "utf-8")
        errors = "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass"
        blank: list[str] = []
        try:
            for number, line in enumerate(
                io.TextIOWrapper(stream, encoding, errors, newline=""), 1
            ):
                if "\0" in line:
                    where = f"{path}, line {number}"
                    raise DataError(
                        "not a text file in UTF-8: NUL bytes",
                        where=where,
                        fix=_conversion(path, head),
                    )
                blank.append(line)
                if line.strip():
                    yield from blank
                    blank.clear()
        except UnicodeDecodeError as error:
            raise DataError(
                f"begins with a byte order mark of {encoding.upper()}, but is not in it: "
                f"{error.reason}",
                where=str(path),
                fix="save it as UTF-8",
            ) from None


def _conversion(path: Path, head: bytes) -> str:
    """The command that makes UTF-8 of a file with NUL bytes, by where they stand."""
    nul = [place for place, byte in enumerate(head) if not byte]
    order = "BE" if nul and nul[0] == 0 else "LE"
    if len(nul) > 0.6 * len(head):
        return convert_command(path, f"UTF-32{order}")
    if len(nul) > 0.3 * len(head):
        return convert_command(path, f"UTF-16{order}")
    return (
        f"{convert_command(path, 'UTF-16LE')} if that is its encoding; or remove them (tr -d "
        "'\\000')"
    )


def convert_command(path: Path, encoding: str) -> str:
    """The shell command that makes a UTF-8 file of one in that encoding."""
    plain = path.with_suffix("") if path.suffix.lower() in _UNPACK else path
    new = shlex.quote(str(plain.with_name(f"{plain.stem}.utf-8{plain.suffix}")))
    iconv = f"iconv -f {encoding} -t UTF-8"
    if unpack := _UNPACK.get(path.suffix.lower()):
        return f"{unpack} {shlex.quote(str(path))} | {iconv} > {new}"
    return f"{iconv} {shlex.quote(str(path))} > {new}"


def file_kind(path: Path) -> str | None:
    """`.jsonl` for x.jsonl and x.JSONL.gz; None for a name that is of no kind we read."""
    *_, inner, last = ("", "", *path.suffixes)
    kind = inner if last.lower() in _COMPRESSIONS and inner.lower() != ".parquet" else last
    return kind.lower() if kind.lower() in _KINDS else None


def no_such_file(path: Path) -> DataError:
    """The error for a missing file: how far the path exists, or the nearest file beside it."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    if folder != path.parent:
        return DataError("no such file", where=str(path), found=f"the path exists up to {folder}")
    nearest = difflib.get_close_matches(
        path.name, [file.name for file in folder.iterdir() if file_kind(file)], n=1, cutoff=0.0
    )
    return DataError(
        "no such file", where=str(path), fix=f"did you mean {nearest[0]!r}?" if nearest else None
    )

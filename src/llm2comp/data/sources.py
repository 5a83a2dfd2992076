"""Where texts and pairs come from: files, Hub data sets, and the documentation that Python carries.

    source → rows {column: value}, or the reason why a row is unusable → texts or pairs, with counts

A bad row never ends a run: it is left out and counted by reason. What makes a whole source useless (no such file or column, a
broken archive, no usable row) is a DataError. Nothing that is read gets executed: no pickles, no scripts of data sets.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llm2comp.data import python_docs
from llm2comp.data.hub import hub_file, hub_rows, hub_version
from llm2comp.data.responses import TEACHER, folder_rows, source_digest
from llm2comp.data.tables import Columns, Row, Rows, check_columns, file_kind, file_rows, no_such_file
from llm2comp.errors import DataError
from llm2comp.files import to_json
from llm2comp.recipe import PairData, TextData, missing_path

T = TypeVar("T")
Spec: TypeAlias = TextData | PairData

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Pair:
    """A query, the text to be found, and texts that look right but are not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A text, what an LM says to it, and (D_t,) float32, a teacher's embedding of that, where one was asked for."""

    text: str
    response: str
    teacher_D: NDArray[np.float32] | None = None


@dataclass
class Tally:
    """What was read of a source so far: rows used, rows left out by reason, and where each reason was first met."""

    source: str
    used: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_at: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: how many rows, how many left out and why."""
        return f"{_shown(self.source)}: {self.used:,} rows" + (f"; left out: {self.left_out()}" if self.skipped else "")

    def left_out(self) -> str:
        """`12 empty, 5 malformed JSON (first at line 17)`."""
        return ", ".join(
            f"{count:,} {reason}" + (f" (first at {self.first_at[reason]})" if reason != "empty" else "")
            for reason, count in self.skipped.items()
        )


@dataclass
class Loaded(Tally, Generic[T]):
    """All that a source gave, in memory. `fingerprint` is the sha256 (hex) over the rows' content."""

    rows: list[T] = field(default_factory=list)
    fingerprint: str = ""


class _UnusableError(Exception):
    """A row to leave out; says why."""


def read_texts(spec: TextData) -> Loaded[str]:
    """Read the texts of a source. Raises DataError when there is no such file or column, or no usable text."""
    return _collect(spec, (spec.column,), functools.partial(_filled, column=spec.column), lambda text: [text])


def iterate_sources(specs: Sequence[TextData], tell: Callable[[str], None]) -> Iterator[str]:
    """Texts of several sources, one at a time; `tell` is given each source's summary at its end. Errors as `read_texts`."""
    for spec in specs:
        tally = Tally(spec.source)
        yield from _items(spec, (spec.column,), functools.partial(_filled, column=spec.column), tally)
        tell(tally.summary())


def source_key(spec: TextData) -> dict[str, Any]:
    """What the texts of a source depend on, for a hash: its content, its name without folders, which rows are asked for.

    Raises:
        DataError: there is no such source.
    """
    settings = spec.model_dump(mode="json", exclude={"source", "response"})
    return settings | {"name": _shown(spec.source), "content": _content(spec)}


def read_answers(spec: TextData, teacher: bool = False) -> Loaded[Answer]:
    """Read texts with their responses (`spec.response`), and the teacher's embeddings of these (column `teacher`) if asked for.

    Raises:
        DataError: no such file, folder or column; a missing or damaged shard; no usable row; embeddings of several widths.
    """
    assert spec.response is not None
    response = spec.response

    def answer(row: Row) -> Answer:
        return Answer(_filled(row, spec.column), _filled(row, response), _vector(row, TEACHER) if teacher else None)

    columns = (spec.column, response, *([TEACHER] if teacher else []))
    loaded = _collect(spec, columns, answer, lambda answer: [answer.text, answer.response])
    widths = sorted({len(answer.teacher_D) for answer in loaded.rows if answer.teacher_D is not None})
    if len(widths) > 1:
        raise DataError("embeddings of several widths", where=f"{spec.source}, column {TEACHER!r}", found=widths)
    return loaded


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
    """All items of a source. `parts` are the strings of an item."""
    loaded: Loaded[T] = Loaded(spec.source)
    digest = hashlib.sha256()
    for item in _items(spec, columns, make, loaded):
        loaded.rows.append(item)
        digest.update(to_json(parts(item)).encode() + b"\n")
    loaded.fingerprint = digest.hexdigest()
    return loaded


def _items(spec: Spec, columns: Columns, make: Callable[[Row], T], tally: Tally) -> Iterator[T]:
    """Make an item of each row until the limit; count the rows that are none."""
    columns_seen: dict[str, None] = {}
    for place, row in _rows(spec, columns):
        try:
            if isinstance(row, str):
                raise _UnusableError(row)
            columns_seen |= dict.fromkeys(row)
            item = make(row)
        except _UnusableError as reason:
            tally.skipped[str(reason)] += 1
            tally.first_at.setdefault(str(reason), place)
            continue
        tally.used += 1
        yield item
        if tally.used == spec.limit:
            break
    if columns_seen:
        check_columns(spec.source, columns, columns_seen)
    if not tally.used:
        raise DataError("no usable row", where=spec.source, found=tally.left_out() or "nothing in it")


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


def _vector(row: Row, column: str) -> NDArray[np.float32]:
    """Get the numbers in a column."""
    try:
        vector_D = np.asarray(row.get(column), dtype=np.float32)
    except (TypeError, ValueError):
        vector_D = np.empty(0, dtype=np.float32)
    if vector_D.ndim != 1 or not vector_D.size or not np.isfinite(vector_D).all():
        raise _UnusableError(f"{column!r} is not a list of numbers")
    return vector_D


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
    """Rows behind a source name, whatever it stands for."""
    path = Path(spec.source).expanduser()
    with _readable(spec.source):
        if spec.source.startswith("builtin:"):
            yield from _builtin_rows(spec.source, columns)
        elif _is_path(spec.source):
            yield from (folder_rows if path.is_dir() else file_rows)(path, columns)
        elif spec.file is not None:
            yield from file_rows(hub_file(spec), columns)
        else:
            yield from hub_rows(spec, columns)


def _content(spec: TextData) -> str:
    """Digest of what `_rows` reads."""
    with _readable(spec.source):
        if spec.source.startswith("builtin:"):
            texts = [row[spec.column] for _, row in _builtin_rows(spec.source, (spec.column,)) if isinstance(row, dict)]
            return hashlib.sha256(to_json(texts).encode()).hexdigest()
        if _is_path(spec.source):
            return source_digest(Path(spec.source).expanduser())
        if spec.file is not None:
            return source_digest(hub_file(spec))
        return hub_version(spec)


@contextlib.contextmanager
def _readable(source: str) -> Iterator[None]:
    """What a disk or an archive throws becomes a DataError."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot be read: {error}", where=source, fix="check that the file is whole") from error


def _is_path(source: str) -> bool:
    """Whether a source is a file or a folder, not a Hub data set. Raises DataError for what can be neither."""
    path = Path(source).expanduser()
    if not path.exists() and (file_kind(path) or not _HUB_NAME.fullmatch(source) or missing_path(source)):
        raise no_such_file(path.absolute())
    return path.exists()


def _shown(source: str) -> str:
    """A source's name in messages: of a file without its folders."""
    return Path(source).name if file_kind(Path(source)) else source


def _builtin_rows(source: str, columns: Columns) -> Rows:
    if source != "builtin:python-docs":
        raise DataError("no such builtin", where=source, expected="builtin:python-docs")
    items = [(text,) for text in python_docs.passages()] if len(columns) == 1 else python_docs.pairs(heldout=False)
    for number, item in enumerate(items, 1):
        yield f"item {number}", dict(zip(columns, item, strict=False))

"""Where texts and pairs come from: files, Hub data sets, and the documentation that Python carries.

    source → rows {column: value}, or the reason why a row is unusable → texts or pairs, with counts

A bad row never ends a run: it is left out and counted by reason. What makes a whole source useless
(no such file or column, a broken archive, no usable row) is a DataError. Nothing that is read gets
executed: no pickles, no scripts of data sets.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa

from llm2comp.data import python_docs
from llm2comp.data.columns import Columns, MissingColumnError, check_columns, settings_for
from llm2comp.data.hub import hub_file, hub_rows, hub_version
from llm2comp.data.loaded import Loaded, Pair, Response, T, Tally, _shown
from llm2comp.data.responses import TEACHER, folder_rows, source_digest
from llm2comp.data.tables import Row, Rows, convert_command, file_kind, file_rows, no_such_file
from llm2comp.data.values import UnusableError, WrittenListError, filled, one_text, stripped, vector
from llm2comp.errors import DataError
from llm2comp.recipe import PairData, TextData, missing_path
from llm2comp.system.files import to_json

Spec: TypeAlias = TextData | PairData

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def read_texts(spec: TextData) -> Loaded[str]:
    """Read the texts of a source.

    Raises DataError when there is no such file or column, or no usable text.
    """
    return _collect(
        spec, (spec.column,), functools.partial(one_text, column=spec.column), lambda text: [text]
    )


def iterate_sources(specs: Sequence[TextData], tell: Callable[[str], None]) -> Iterator[str]:
    """Texts of several sources, one at a time; `tell` is given each source's summary at its end.

    Errors as `read_texts`.
    """
    for spec in specs:
        tally = Tally(spec.source)
        yield from items_of(
            spec, (spec.column,), functools.partial(one_text, column=spec.column), tally
        )
        tell(tally.summary())


def source_key(spec: TextData) -> dict[str, Any]:
    """What a source's texts depend on, for a hash: its content, plain name, and rows asked for.

    Raises:
        DataError: there is no such source.
    """
    settings = spec.model_dump(mode="json", exclude={"source", "response"})
    return settings | {"name": _shown(spec.source), "content": _content(spec)}


def read_responses(spec: TextData, teacher: bool = False) -> Loaded[Response]:
    """Read texts with their responses (`spec.response`).

    If asked for, also the teacher's embeddings of these (column `teacher`).

    Raises:
        DataError: no such file, folder or column; a missing or damaged shard; no usable row;
            embeddings of several widths.
    """
    assert spec.response is not None
    response = spec.response

    def given(row: Row) -> list[Response]:
        return [
            Response(
                filled(row, spec.column),
                filled(row, response),
                vector(row, TEACHER) if teacher else None,
            )
        ]

    columns = (spec.column, response, *([TEACHER] if teacher else []))
    loaded = _collect(spec, columns, given, lambda given: [given.text, given.response])
    widths = sorted({len(given.teacher_D) for given in loaded.rows if given.teacher_D is not None})
    if len(widths) > 1:
        raise DataError(
            "embeddings of several widths", where=f"{spec.source}, column {TEACHER!r}", found=widths
        )
    return loaded


def read_pairs(spec: PairData) -> Loaded[Pair]:
    """Read the training pairs of a source, without the white space around each text.

    A list of positives gives a pair for each.

    Raises:
        DataError: no such file or column, a list that is written as a string, or no usable pair.
    """

    def pairs(row: Row) -> list[Pair]:
        anchor = filled(row, spec.anchor).strip()
        positives = stripped(row, spec.positive)
        if not positives:
            raise UnusableError("empty" if spec.positive in row else f"no column {spec.positive!r}")
        negatives = [
            text
            for column in spec.negatives
            for text in stripped(row, column)
            if text not in positives
        ]
        if not (right := [text for text in positives if text != anchor]):
            raise UnusableError("positive equals query")
        return [Pair(anchor, positive, tuple(negatives)) for positive in right]

    columns = (spec.anchor, spec.positive, *spec.negatives)
    return _collect(
        spec, columns, pairs, lambda pair: [pair.anchor, pair.positive, *pair.negatives]
    )


def check_sources(specs: Iterable[Spec]) -> None:
    """Raise DataError if a source is neither an existing file nor a possible Hub id.

    Reads nothing.
    """
    for spec in specs:
        if not spec.source.startswith("builtin:"):
            _is_path(spec.source)


def _collect(
    spec: Spec, columns: Columns, make: Callable[[Row], list[T]], parts: Callable[[T], list[str]]
) -> Loaded[T]:
    """All items of a source. `parts` are the strings of an item."""
    loaded: Loaded[T] = Loaded(spec.source)
    digest = hashlib.sha256()
    for item in items_of(spec, columns, make, loaded):
        loaded.rows.append(item)
        loaded.numbers.append(loaded.there - 1)
        digest.update(to_json(parts(item)).encode() + b"\n")
    loaded.fingerprint = digest.hexdigest()
    return loaded


def items_of(
    spec: Spec, columns: Columns, make: Callable[[Row], list[T]], tally: Tally
) -> Iterator[T]:
    """Turn rows into items up to the limit; count rows without one. Errors as `read_texts`."""
    columns_seen: dict[str, None] = {}
    for place, row in _rows(spec, columns):
        tally.there += 1
        try:
            if isinstance(row, str):
                raise UnusableError(row)
            columns_seen |= dict.fromkeys(row)
            items = make(row)
        except UnusableError as reason:
            tally.leave_out(str(reason), place)
            continue
        except WrittenListError as error:
            fix = (
                "write it as JSON lines with a real list, or one text per column (negatives: "
                "[n1, n2])"
            )
            problem = "a list written as a string is no text"
            raise DataError(
                problem, where=f"{spec.source}, {place}", found=str(error)[:80], fix=fix
            ) from None
        tally.used += 1
        yield from items
        if tally.used == spec.limit:
            break
    with _readable(spec):
        if columns_seen:
            check_columns(spec.source, columns, columns_seen)
    if not tally.used:
        advice = (
            convert_command(Path(spec.source), "WINDOWS-1252")
            if "not UTF-8" in tally.skipped
            else None
        )
        raise DataError(
            "no usable row",
            where=spec.source,
            found=tally.left_out() or "nothing in it",
            fix=advice,
        )


def _rows(spec: Spec, columns: Columns) -> Rows:
    """Rows of any source: builtin, file, folder or Hub data set."""
    path = Path(spec.source).expanduser()
    with _readable(spec):
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
    with _readable(spec):
        if spec.source.startswith("builtin:"):
            texts = [
                row[spec.column]
                for _, row in _builtin_rows(spec.source, (spec.column,))
                if isinstance(row, dict)
            ]
            return hashlib.sha256(to_json(texts).encode()).hexdigest()
        if _is_path(spec.source):
            return source_digest(Path(spec.source).expanduser())
        if spec.file is not None:
            return source_digest(hub_file(spec))
        return hub_version(spec)


@contextlib.contextmanager
def _readable(spec: Spec) -> Iterator[None]:
    """Turn errors of disk and archive into a DataError.

    For a missing column, say what the recipe should be.
    """
    try:
        yield
    except MissingColumnError as error:
        roles = (
            ("column", "response")
            if isinstance(spec, TextData)
            else ("anchor", "positive", "negatives")
        )
        asked = {role: value for role in roles if (value := getattr(spec, role))}
        settings = settings_for({"source": spec.source, **asked}, error.names)
        raise error.advised(settings and f"name the file's own columns: {settings}") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"cannot be read: {error}", where=spec.source, fix="check that the file is whole"
        ) from error


def _is_path(source: str) -> bool:
    """Whether a source is a file or a folder, not a Hub data set.

    Raises DataError for what can be neither.
    """
    path = Path(source).expanduser()
    if not path.exists() and (
        file_kind(path) or not _HUB_NAME.fullmatch(source) or missing_path(source)
    ):
        raise no_such_file(path.absolute())
    return path.exists()


def _builtin_rows(source: str, columns: Columns) -> Rows:
    if source != "builtin:python-docs":
        raise DataError("no such builtin", where=source, expected="builtin:python-docs")
    items = (
        [(text,) for text in python_docs.passages()]
        if len(columns) == 1
        else python_docs.pairs(heldout=False)
    )
    for number, item in enumerate(items, 1):
        yield f"item {number}", dict(zip(columns, item, strict=False))

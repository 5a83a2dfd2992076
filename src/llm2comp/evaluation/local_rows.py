"""Files of a local evaluation set → checked rows → the data that mteb's tasks evaluate.

Training leaves bad rows out and counts them. A figure needs every row: the first bad one is a DataError with its file and line.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset, DatasetDict
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

from llm2comp.data.tables import file_rows
from llm2comp.errors import DataError
from llm2comp.files import sha256

Parts: TypeAlias = DatasetDict | dict[str, RetrievalSplitData]  # split → its data

_COMPRESSIONS = ("", ".gz", ".zst")
_SPLITS = ("test", "dev", "train")
_QRELS = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class Row:
    """One row and its line number. Every method returns a checked value or raises DataError."""

    where: str
    values: dict[str, Any]

    def value(self, key: str) -> Any:
        """Whatever stands there."""
        if key not in self.values:
            raise DataError(f"no key {key!r}", where=self.where, found=", ".join(self.values) or "no key at all")
        return self.values[key]

    def text(self, key: str, *, may_be_blank: bool = False) -> str:
        """A string."""
        return self._checked_text(key, self.value(key), may_be_blank)

    def title(self) -> str:
        """A document's title; many collections have none."""
        return "" if self.values.get("title") is None else self.text("title", may_be_blank=True)

    def texts(self, key: str) -> list[str]:
        """A list of at least one text."""
        values = self.value(key)
        if not isinstance(values, list) or not values:
            raise self._wrong(key, "a list of one or more strings")
        return [self._checked_text(key, value, may_be_blank=False) for value in values]

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
            raise self._wrong(key, "a number")
        return float(value)

    def label(self, key: str) -> str:
        """A class by its name without outer spaces; a whole number (1 or 1.0) counts as its digits, yes or no as a word."""
        value = self.value(key)
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            return str(value).lower() if isinstance(value, bool) else str(int(value))
        return self.text(key).strip()

    def zero_or_one(self, key: str) -> int:
        """A yes or no."""
        value = self.value(key)
        if value not in (0, 1):
            raise self._wrong(key, "0 or 1")
        return int(value)

    def relevance(self, key: str) -> int:
        """A grade from a table, where every value is a string."""
        if not re.fullmatch(r"[0-9]{1,3}", self.value(key)):
            raise self._wrong(key, "a whole number from 0 to 999")
        return int(self.value(key))

    def _checked_text(self, key: str, value: object, may_be_blank: bool) -> str:
        if not isinstance(value, str) or not (may_be_blank or value.strip()):
            raise self._wrong(key, "a string" if may_be_blank else "a string with a text in it")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._wrong(key, "a text in UTF-8") from None
        return value

    def _wrong(self, key: str, expected: str) -> DataError:
        return DataError(f"{key!r} is not {expected}", where=self.where, found=ascii(self.values[key])[:80])


class SetFiles:
    """The files of one set. Everything read from them is part of the revision."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: set[Path] = set()

    def find(self, name: str) -> Path | None:
        """The file of that name, plain or compressed. Raises DataError if there is more than one."""
        found = [path for ending in _COMPRESSIONS if (path := self.folder / f"{name}{ending}").is_file()]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError("the same part twice", where=str(self.folder), found=names, fix="keep one of them")
        return found[0] if found else None

    def evaluated_split(self, pattern: str) -> str:
        """`test`, or `dev` if there is no test part. Raises DataError if there is neither."""
        for split in ("test", "dev"):
            if self.find(pattern.format(split)):
                return split
        raise self._missing(" or ".join(pattern.format(split) for split in ("test", "dev")))

    def rows(self, name: str, *columns: str) -> list[Row]:
        """All rows of a file; `columns` must be in a table's header. Raises DataError if it is missing, unreadable or empty."""
        path = self.find(name)
        if path is None:
            raise self._missing(name)
        self._read.add(path)
        try:
            rows = list(self._rows(path, columns))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot be read: {error}", where=str(path), fix="check that the file is whole") from error
        if not rows:
            raise DataError("no row in it", where=str(path), expected="one row for each item to evaluate")
        return rows

    def revision(self) -> str:
        """First 12 hex digits of the sha256 over names and contents of the files that were read."""
        lines = (f"{path.relative_to(self.folder).as_posix()} {sha256(path)}\n" for path in sorted(self._read))
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]

    @staticmethod
    def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
        for place, row in file_rows(path, columns):
            where = f"{path}, {place}"
            if isinstance(row, str):
                raise DataError(f"unusable row: {row}", where=where, fix="mend or remove it")
            yield Row(where, row)

    def _missing(self, expected: str) -> DataError:
        if not self.folder.is_dir():
            return DataError("no such folder", where=str(self.folder))
        names = sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        found = ", ".join(names[:10]) or "no file"
        return DataError("a part is missing", where=str(self.folder), expected=f"{expected} (plain, .gz or .zst)", found=found)


def read_sts(files: SetFiles, split: str) -> Parts:
    """Pairs of sentences with a score each, on any scale."""
    rows = files.rows(f"{split}.jsonl")
    table = [{"sentence1": r.text("sentence1"), "sentence2": r.text("sentence2"), "score": r.number("score")} for r in rows]
    _must_differ((row["score"] for row in table), "score", rows)
    return DatasetDict({split: Dataset.from_list(table)})


def read_pairs(files: SetFiles, split: str) -> Parts:
    """Pairs of sentences that mean the same (1) or not (0)."""
    rows = files.rows(f"{split}.jsonl")
    table = [
        {"sentence1": r.text("sentence1"), "sentence2": r.text("sentence2"), "labels": r.zero_or_one("label")} for r in rows
    ]
    _must_differ((row["labels"] for row in table), "label", rows)
    return DatasetDict({split: Dataset.from_list(table)})


def read_classification(files: SetFiles, split: str) -> Parts:
    """Texts with a class, to learn from and to judge by. Classes become numbers, in the order of their names."""
    train, judged = files.rows("train.jsonl"), files.rows(f"{split}.jsonl")
    codes = {name: code for code, name in enumerate(sorted({row.label("label") for row in train}))}
    _must_differ(codes, "label", train)
    for row in judged:
        if row.label("label") not in codes:
            nearest = difflib.get_close_matches(row.label("label"), codes, n=1)
            fix = f"did you mean {nearest[0]!r}?" if nearest else None
            raise DataError(f"no text of the train part has the label {row.label('label')!r}", where=row.where, fix=fix)
    tables = {
        name: Dataset.from_list([{"text": row.text("text"), "label": codes[row.label("label")]} for row in rows])
        for name, rows in (("train", train), (split, judged))
    }
    return DatasetDict(tables)


def read_clustering(files: SetFiles, split: str) -> Parts:
    """Texts with the class that a cluster should gather."""
    rows = files.rows(f"{split}.jsonl")
    table = [{"sentences": row.text("text"), "labels": row.label("label")} for row in rows]
    _must_differ((row["labels"] for row in table), "label", rows)
    return DatasetDict({split: Dataset.from_list(table)})


def read_retrieval(files: SetFiles, split: str) -> Parts:
    """Documents, queries and judgements in BEIR's layout. A query that only another split judges is left to that split."""
    documents, queries = _by_id(files.rows("corpus.jsonl")), _by_id(files.rows("queries.jsonl"))
    relevant: dict[str, dict[str, int]] = {}
    for row in files.rows(f"qrels/{split}.tsv", *_QRELS):
        query, document = row.value("query-id"), row.value("corpus-id")
        for name, key, known in (("queries", query, queries), ("corpus", document, documents)):
            if key not in known:
                raise DataError(f"{key!r} is no _id of {name}.jsonl", where=row.where)
        if document in relevant.setdefault(query, {}):
            raise DataError(f"query {query!r} and document {document!r} are judged twice", where=row.where)
        relevant[query][document] = row.relevance("score")
    elsewhere = {
        row.value("query-id")
        for other in _SPLITS
        if other != split and files.find(f"qrels/{other}.tsv")
        for row in files.rows(f"qrels/{other}.tsv", *_QRELS)
    }
    for query, row in queries.items():
        if not any(relevant.get(query, {}).values()) and (query in relevant or query not in elsewhere):
            raise DataError(f"query {query!r} has no relevant document", where=row.where, fix="remove it or judge it")
    corpus = [{"id": key, "title": row.title(), "text": row.text("text", may_be_blank=True)} for key, row in documents.items()]
    asked = [{"id": key, "text": row.text("text")} for key, row in queries.items() if key in relevant]
    return {split: collection(corpus, asked, relevant, None)}


def read_reranking(files: SetFiles, split: str) -> Parts:
    """Queries with their candidates. Wrong candidates get larger ids, which rank first on ties: ties give no advantage."""
    corpus: list[dict[str, str]] = []
    queries: list[dict[str, str]] = []
    relevant: dict[str, dict[str, int]] = {}
    for number, row in enumerate(files.rows(f"{split}.jsonl")):
        query = str(number)
        queries.append({"id": query, "text": row.text("query")})
        relevant[query] = {}
        for key, prefix, grade in (("positive", "answer", 1), ("negative", "other", 0)):
            for index, text in enumerate(row.texts(key)):
                document = f"{query}-{prefix}-{index}"
                corpus.append({"id": document, "title": "", "text": text})
                relevant[query][document] = grade
    candidates = {query: list(documents) for query, documents in relevant.items()}
    return {split: collection(corpus, queries, relevant, candidates)}


def collection(
    corpus: list[dict[str, str]],
    queries: list[dict[str, str]],
    relevant: dict[str, dict[str, int]],
    candidates: dict[str, list[str]] | None,
) -> RetrievalSplitData:
    """What mteb ranks: documents, queries, query → document → grade, and query → candidates where not all are ranked."""
    return RetrievalSplitData(
        corpus=Dataset.from_list(corpus), queries=Dataset.from_list(queries), relevant_docs=relevant, top_ranked=candidates
    )


def _by_id(rows: list[Row]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in rows:
        first = found.setdefault(row.text("_id"), row)
        if first is not row:
            raise DataError(f"_id {row.text('_id')!r} is there twice", where=row.where, found=f"first at {first.where}")
    return found


def _must_differ(values: Iterable[object], key: str, rows: list[Row]) -> None:
    """Raise DataError if all rows have the same value: every encoder would get the same score, or none."""
    if len(set(values)) < 2:
        raise DataError(f"every row has the same {key!r}", where=rows[0].where, expected="two or more different ones")

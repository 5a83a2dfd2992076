"""Passages with their vectors in a LanceDB table: kept, replaced, searched by words and vectors.

Vectors are searched exactly, in memory, up to `EXACT_UP_TO` passages; above that by an IVF index
whose recall against exact search is measured when it is built. Words are searched by LanceDB's
full-text index, BM25.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import lancedb
import numpy as np
import pyarrow as pa
from lancedb.index import FTS, IvfFlat
from lancedb.query import MatchQuery
from numpy.typing import NDArray

from llm2comp.errors import RunError, one_line
from llm2comp.use.index.hits import Hit, words_of

# Measured: a matrix product over so many vectors is some tens of milliseconds.
EXACT_UP_TO = 250_000
WANTED_RECALL, TRIALS, AT = 0.98, 100, 10
KEPT_VERSIONS = timedelta(hours=1)  # a search that began before a change may still read the old
# Number of a row in the table as it is, score; the best first.
Ranked: TypeAlias = list[tuple[int, float]]


@dataclass(frozen=True)
class FileState:
    """A file as it was when it was indexed."""

    sha256: str
    size: int
    mtime: int


def schema_of(dimensions: int) -> pa.Schema:
    """Columns of the table.

    `text` is a passage below its headings, `number` its place in the file.
    """
    return pa.schema(
        [
            ("path", pa.string()),
            ("sha256", pa.string()),
            ("size", pa.int64()),
            ("mtime", pa.int64()),
            ("number", pa.int32()),
            ("headings", pa.list_(pa.string())),
            ("first", pa.int32()),
            ("last", pa.int32()),
            ("text", pa.string()),
            ("vector", pa.list_(pa.float32(), dimensions)),
        ]
    )


class Store:
    """One table of an index.

    Args:
        db: the folder of the index.
        name: of the table.
        dimensions: makes the table, where it is not there yet.
        version: of the table, to be read alone; None: always the newest.
    """

    def __init__(
        self, db: Path, name: str, dimensions: int | None = None, version: int | None = None
    ) -> None:
        self.db, self.name = db, name
        connection = lancedb.connect(str(db), read_consistency_interval=timedelta(0))
        if dimensions is not None and name not in connection.list_tables().tables:
            self.table = connection.create_table(name, schema=schema_of(dimensions))
            self.table.create_index("text", config=FTS(stem=True, remove_stop_words=False))
        else:
            self.table = connection.open_table(name, version=version)
        self._vectors: tuple[int, NDArray[np.uint64], NDArray[np.float32]] | None = None
        self._pinned: Store | None = None

    def __len__(self) -> int:
        return int(self.table.count_rows())

    def pinned(self) -> Store:
        """The table as it is now, to be read several times whatever is written meanwhile.

        The number of a row holds within one version alone: compacting gives it another.
        """
        version = self.table.version
        if self._pinned is None or self._pinned.table.version != version:
            self._pinned = Store(self.db, self.name, version=version)
        return self._pinned

    def files(self, below: Path | None = None) -> dict[str, FileState]:
        """What is known of each file, or of those below a folder (or that file itself)."""
        query = self.table.search().select(["path", "sha256", "size", "mtime"])
        if below is not None:
            query = query.where(f"path = {_quoted(str(below))} OR {_under(below)}")
        table = query.to_arrow()
        columns = (table[name].to_pylist() for name in ("path", "sha256", "size", "mtime"))
        return {path: FileState(*state) for path, *state in zip(*columns, strict=True)}

    def remove(self, paths: Iterable[str]) -> None:
        """Take the passages of some files out."""
        if quoted := ", ".join(map(_quoted, paths)):
            self.table.delete(f"path IN ({quoted})")

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put rows in, all or none."""
        self.table.add(pa.Table.from_pylist(list(rows), schema=self.table.schema))

    def batches(self, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        """All rows, some columns of them, so many at once."""
        yield from self.table.search().select(list(columns)).to_batches(size)

    def finish(self) -> tuple[int | None, float | None]:
        """Compact what many small writes left, and bring the indexes up to date.

        Returns the partitions to search and the recall of the approximate index; None, None
        where search is exact.
        """
        if len(self) > EXACT_UP_TO and not self._approximate:
            self.table.create_index("vector", config=IvfFlat(distance_type="cosine"))
        self.table.optimize(cleanup_older_than=KEPT_VERSIONS)
        return self._measured() if self._approximate else (None, None)

    def by_words(self, text: str, k: int, where: str | None = None) -> Ranked:
        """The k best passages by BM25 over stems of words."""
        # a string between quotes would be a phrase, which this index has no positions for
        words = MatchQuery(text, "text")  # type: ignore[call-arg]
        query = self.table.search(words, query_type="fts").select(["_score"])
        if where:
            query = query.where(where)
        found = query.with_row_id(True).limit(k).to_arrow()
        return list(zip(found["_rowid"].to_pylist(), found["_score"].to_pylist(), strict=True))

    def by_vector(
        self,
        vector_D: NDArray[np.float32],
        k: int,
        where: str | None = None,
        nprobes: int | None = None,
    ) -> Ranked:
        """The k passages of highest cosine; exactly, unless `nprobes` partitions are searched."""
        if nprobes is not None:
            return self._nearest(vector_D, k, where, nprobes)
        ids_N, vectors_ND = self._in_memory()
        scores_N = vectors_ND @ vector_D
        if where:
            query = self.table.search().where(where).select([]).with_row_id(True)
            scores_N[~np.isin(ids_N, query.to_arrow()["_rowid"].to_numpy())] = -np.inf
        k = min(k, len(scores_N))
        best = np.argpartition(-scores_N, k - 1)[:k] if k else np.zeros(0, dtype=int)
        best = best[np.argsort(-scores_N[best], kind="stable")]
        return [(int(ids_N[i]), float(scores_N[i])) for i in best if np.isfinite(scores_N[i])]

    def rows(self, ids: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Passages by their numbers."""
        columns = ["path", "headings", "first", "last", "text"]
        found = self.table.take_row_ids(list(ids)).select(columns).with_row_id().to_arrow()
        return {row.pop("_rowid"): row for row in found.to_pylist()}

    @property
    def _approximate(self) -> bool:
        return any(index.columns == ["vector"] for index in self.table.list_indices())

    def _in_memory(self) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
        """Numbers and vectors of all rows, read again when the table has changed."""
        version = self.table.version
        if self._vectors is None or self._vectors[0] != version:
            found = self.table.search().select(["vector"]).with_row_id(True).to_arrow()
            flat = found["vector"].combine_chunks().flatten().to_numpy()
            ids = found["_rowid"].to_numpy()
            dimensions = found.schema.field("vector").type.list_size
            self._vectors = version, ids, flat.reshape(len(ids), dimensions)
        return self._vectors[1:]

    def _nearest(
        self, vector_D: NDArray[np.float32], k: int, where: str | None, nprobes: int | None
    ) -> Ranked:
        """LanceDB's own search: by the index, or (`nprobes` None) past it."""
        query: Any = self.table.search(vector_D)
        query = query.distance_type("cosine").select(["_distance"])
        query = query.bypass_vector_index() if nprobes is None else query.nprobes(nprobes)
        if where:
            query = query.where(where)
        found = query.with_row_id(True).limit(k).to_arrow()
        scores = (1 - distance for distance in found["_distance"].to_pylist())
        return list(zip(found["_rowid"].to_pylist(), scores, strict=True))

    def _measured(self) -> tuple[int, float]:
        """Partitions to search for the recall wanted, and the recall; trials are stored vectors."""
        chosen = np.random.default_rng(0).choice(len(self), min(TRIALS, len(self)), replace=False)
        found = self.table.take_offsets(sorted(chosen.tolist())).select(["vector"]).to_arrow()
        vectors = [np.asarray(row, dtype=np.float32) for row in found["vector"].to_pylist()]
        # a trial finds itself first, which says nothing
        exact = [_others(self._nearest(vector, AT + 1, None, None)) for vector in vectors]
        nprobes, most = 1, int(np.sqrt(len(self)))  # there are fewer partitions than that
        while True:
            near = [_others(self._nearest(vector, AT + 1, None, nprobes)) for vector in vectors]
            recall = float(
                np.mean([len(a & b) / max(1, len(a)) for a, b in zip(exact, near, strict=True)])
            )
            if recall >= WANTED_RECALL or nprobes >= most:
                return nprobes, recall
            nprobes *= 2


@contextlib.contextmanager
def readable(db: Path) -> Iterator[None]:
    """Turn what LanceDB raises over missing or damaged files into a RunError."""
    try:
        yield
    except (RuntimeError, ValueError, OSError) as error:
        cause = one_line(error).partition(", /")[0].replace("error: ", "")  # no places in Rust
        raise RunError(
            f"cannot be read: {cause}",
            where=str(db),
            fix="remove the folder and index the documents again",
        ) from error


def matching(pattern: str) -> str:
    """A condition: the path is, or lies below, what a pattern such as `guide/*.md` names.

    A pattern begins at any folder of the path, `*` stands for any part, over / too.
    """
    plain = re.escape(pattern.rstrip("/")).replace(r"\*", ".*").replace(r"\?", ".")
    begin = "^" if pattern.startswith("/") else "(^|/)"
    return f"regexp_like(path, {_quoted(f'(?s){begin}{plain}(/.*)?$')})"


def stems(text: str, telling: bool = False) -> set[str]:
    """The words of a text as the full-text index knows them; `telling`: without "the", "is", ..."""
    return {token.text for token in lancedb.tokenize(text, stem=True, remove_stop_words=telling)}


def hits_of(ranked: Ranked, rows: dict[int, dict[str, Any]], question: str) -> list[Hit]:
    """Ranked passages with the words that they share with a question, in their order."""
    wanted = stems(question, telling=True) or stems(question)

    def hit(row: dict[str, Any], score: float) -> Hit:
        headings = tuple(row["headings"])
        text = row["text"].partition("\n")[2] if headings else row["text"]
        matched = sorted(word for word in words_of(text) if stems(word) & wanted)
        return Hit(row["path"], row["first"], row["last"], headings, text, score, tuple(matched))

    return [hit(rows[number], score) for number, score in ranked]


def drop_other_tables(db: Path, name: str) -> None:
    """Remove the tables of other models."""
    connection = lancedb.connect(str(db))
    for other in set(connection.list_tables().tables) - {name}:
        connection.drop_table(other)


def _others(found: Ranked) -> set[int]:
    return {number for number, _ in found[1:]}


def _under(folder: Path) -> str:
    return f"starts_with(path, {_quoted(f'{str(folder).rstrip(chr(47))}/')})"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"

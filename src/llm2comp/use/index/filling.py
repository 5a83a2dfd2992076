"""What writes to an index: files → rows, and the rows of one index → those of another model's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from llm2comp.data.documents import MOST_BYTES, Passage, Report, passages, read_or_report
from llm2comp.errors import RunError
from llm2comp.system.console import Bar
from llm2comp.system.files import explain_disk_errors, sha256
from llm2comp.system.folders import INDEX, claim, unclaim
from llm2comp.use.index.info import Info, read_info
from llm2comp.use.index.store import FileState, Store

if TYPE_CHECKING:
    from llm2comp.use.index.encoding import Encoder

AT_ONCE = 512  # passages that are embedded and written together
_COPIED = ("path", "sha256", "size", "mtime", "number", "headings", "first", "last", "text")


@dataclass(frozen=True)
class Added:
    """What `Index.add` did: the report of the folder, and counts of files and passages."""

    report: Report
    changed: int
    unchanged: int
    gone: int
    passages: int

    def summary(self) -> str:
        """What was read and left out, and what the index holds now."""
        return (
            f"{self.report.summary()}\n{self.changed:,} new or changed, {self.unchanged:,} "
            f"unchanged, {self.gone:,} gone; {self.passages:,} passages in the index"
        )


@contextlib.contextmanager
def writing(db: Path) -> Iterator[None]:
    """Hold an index against other writers.

    A failed write names the place; an index that was not begun leaves nothing behind.
    """
    with explain_disk_errors(db):
        before = claim(db, INDEX)
        try:
            lock = FileLock(db / ".lock").acquire(timeout=0)
        except Timeout:
            fix = "wait for it to end; searching goes on meanwhile"
            problem = "another process writes to this index"
            raise RunError(problem, where=str(db), fix=fix) from None
        with lock:
            try:
                yield
            finally:
                if read_info(db) is None:
                    unclaim(db, before)


def unchanged(path: Path, state: FileState | None) -> bool:
    """Whether a file is as it was when it was indexed: by size and time, or else by content."""
    with contextlib.suppress(OSError):  # reading it will say what is wrong
        now = path.stat()
        if state is not None and now.st_size == state.size:
            return now.st_mtime_ns == state.mtime or sha256(path) == state.sha256
    return False


def fill(
    files: Sequence[Path],
    root: Path,
    report: Report,
    begin: Callable[[], tuple[Info, Store, Encoder]],
) -> set[str]:
    """Read, cut, embed and store files, some hundred passages at a time.

    Args:
        files: what to read.
        root: the folder that they are told by in the report.
        report: is told what could not be read.
        begin: opens the index, or makes it; called when there is something to store.

    Returns the paths that could not be read.
    """
    unreadable, batch = set[str](), list[tuple[dict[str, Any], Passage]]()
    found, read = 0, list(accumulate(_size(path) for path in files))
    with Bar("index", 0, shown=bool(files), unit="passages") as bar:
        for path, bytes_read in zip(files, read, strict=True):
            name = path.name if path == root else path.relative_to(root).as_posix()
            state = _state(path)  # what is written from here on is a change for the next time
            document = read_or_report(path, name, report)
            if document is None or not state:
                unreadable.add(str(path))
            else:
                info, store, encoder = begin()
                size, overlap = info.passage_tokens, info.overlap
                cut = passages(document, encoder.offsets, size, overlap, encoder.room)
                batch += [(state | {"number": number}, part) for number, part in enumerate(cut)]
                found += len(cut)
                # the files to come have as many passages a byte as those before
                bar.expect(round(found * read[-1] / max(1, bytes_read)))
            if len(batch) >= AT_ONCE:
                _store(batch, store, encoder, bar)
        bar.expect(found)
        if batch:
            _store(batch, store, encoder, bar)
    return unreadable


def copy(old: Store, new: Store, encoder: Encoder) -> int:
    """Embed the passages of a store anew for another; what is there already is not done again.

    Returns how many are longer than the encoder reads, so that their ends are in no vector.
    """

    def keys(store: Store) -> set[tuple[Any, ...]]:
        columns = ("path", "sha256", "number")
        return {
            tuple(row[name] for name in columns)
            for batch in store.batches(columns, AT_ONCE)
            for row in batch.to_pylist()
        }

    wanted, done = keys(old), keys(new)
    new.remove({path for path, *_ in done - wanted})
    done, long = keys(new), 0
    with Bar("migrate", len(wanted), len(done), unit="passages") as bar:
        for batch in old.batches(_COPIED, AT_ONCE):
            there = batch.to_pylist()
            long += sum(len(encoder.offsets(row["text"])) > encoder.room for row in there)
            rows = [row for row in there if (row["path"], row["sha256"], row["number"]) not in done]
            if rows:
                new.add(_with_vectors(rows, encoder, bar))
    return long


def _state(path: Path) -> dict[str, Any]:
    """A file as it is now; empty where reading it will say what is wrong."""
    with contextlib.suppress(OSError):
        if (now := path.stat()).st_size <= MOST_BYTES:
            times = {"size": now.st_size, "mtime": now.st_mtime_ns}
            return {"path": str(path), "sha256": sha256(path)} | times
    return {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # reading it will say what is wrong
        return 0


def _store(
    batch: list[tuple[dict[str, Any], Passage]], store: Store, encoder: Encoder, bar: Bar
) -> None:
    """Embed and write passages, in the place of what their files had; empties the batch."""
    rows = [
        state | {"headings": p.headings, "first": p.first, "last": p.last, "text": p.in_context}
        for state, p in batch
    ]
    store.remove({state["path"] for state, _ in batch})
    store.add(_with_vectors(rows, encoder, bar))
    batch.clear()


def _with_vectors(
    rows: Sequence[dict[str, Any]], encoder: Encoder, bar: Bar
) -> list[dict[str, Any]]:
    vectors_ND = encoder.vectors([row["text"] for row in rows], "document", bar)
    return [row | {"vector": vector_D} for row, vector_D in zip(rows, vectors_ND, strict=True)]

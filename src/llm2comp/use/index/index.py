"""`llm2comp.Index`: folders of documents → passages with vectors → answers to questions.

    index = llm2comp.Index("docs.db")
    print(index.add("docs").summary())
    for hit in index.search("how is a run resumed?", k=5):
        print(hit.path, hit.first, hit.snippet)

Only changed files are read and embedded again; files that are gone leave. The passages of a file
are written together, so what was interrupted goes on where it stopped. What needs torch is imported
inside functions, as a search by words alone has no use for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from llm2comp.data.documents import OVERLAP, Report, find_files
from llm2comp.errors import DataError, RunError
from llm2comp.recipe import expanded, nearest
from llm2comp.system.console import GENERAL
from llm2comp.system.files import is_unicode
from llm2comp.use.index.filling import Added, copy, fill, unchanged, writing
from llm2comp.use.index.hits import Hit, check_question, fused
from llm2comp.use.index.info import Info, absolute, place_of, read_info, require_info, write_info
from llm2comp.use.index.store import Store, drop_other_tables, hits_of, matching, readable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llm2comp.use.index.encoding import Encoder
    from llm2comp.use.index.store import FileState

Mode: TypeAlias = Literal["hybrid", "vectors", "keywords"]
T = TypeVar("T")
_CANDIDATES = 100  # of each ranking, at least, before they are fused


class Index:
    """An index of documents, in a folder.

    Args:
        db: the folder; made when documents are first added.
        model: what names the encoder, as `llm2comp.load` takes it; None: the index's own, or
            `builtin:general` for a new one.
        device: of the encoder.
        passage_tokens: most tokens of a passage of a new index; None: 256, or what the model reads.
        overlap: how many tokens neighbours share in a new index.

    Raises:
        RunError: an index of another version, or damaged.
    """

    def __init__(
        self,
        db: str | Path,
        model: str | Path | None = None,
        *,
        device: str | None = None,
        passage_tokens: int | None = None,
        overlap: int = OVERLAP,
    ) -> None:
        self.db = expanded(db).absolute()
        self._asked = None if model is None else place_of(model)
        self._device, self._size, self._overlap = device, passage_tokens, overlap
        self._store: Store | None = None
        self._encoder: Encoder | None = None
        read_info(self.db)

    @property
    def info(self) -> dict[str, Any]:
        """Model, revision, dimensions, how many files and passages, how vectors are searched."""

        def read() -> tuple[Info, int, int]:
            info, store = self._open()
            with readable(self.db):
                return info, len(store.files()), len(store)

        info, files, passages = self._reading(read)
        return {
            "model": info.model,
            "revision": info.revision,
            "dimensions": info.dimensions,
            "passage_tokens": info.passage_tokens,
            "files": files,
            "passages": passages,
            "search": "exact" if info.nprobes is None else f"IVF, recall@10 {info.recall:.3f}",
        }

    def add(self, folder: str | Path) -> Added:
        """Bring the index up to date with a folder, or a file.

        Raises:
            DataError: as `require`; nothing in it that can be read. RunError: the vectors are of
                another model; another process writes to the index; the disk is full.
        """
        root = self.require(folder)
        report = Report(str(folder))
        files = find_files(root, report)
        info = read_info(self.db)
        known = self._known(root)
        if not files and not known:
            found = report.left_out() or "an empty folder"
            raise DataError("no documents in it", where=str(folder), found=found)
        with writing(self.db):
            if info and self._asked is not None:
                self._encoder_of(info)
            return self._update(root, files, report)

    def require(self, folder: str | Path) -> Path:
        """The absolute path of documents to index. Raises DataError: no such file or folder.

        One that is gone is not taken for an empty one: its drive may not be mounted.
        """
        root = absolute(folder)
        if not root.exists():
            found = fix = None
            if known := self._known(root):
                found = f"{len(known):,} files of it in the index"
                fix = f"if it is gone for good: llm2comp index --remove {root} --db {self.db}"
            raise DataError("no such file or folder", where=str(folder), found=found, fix=fix)
        return root

    def remove(self, path: str | Path) -> int:
        """Take a file, or all files below a folder, out of the index; gone from the disk or not.

        Returns how many files.

        Raises:
            DataError: nothing of it is in the index. RunError: no index; another process writes to
                it; the disk is full.
        """
        self._open()
        root = absolute(path)
        with writing(self.db):
            gone = self._known(root)
            if not gone:
                files = [Path(file) for file in self._known(Path(root.anchor))]
                near = {str(file.parent if file.parent != root.parent else file) for file in files}
                found = f"{len(files):,} files" + (
                    f" in {os.path.commonpath(near)}" if near else ""
                )
                problem, fix = "nothing of it is in the index", nearest(str(root), near)
                raise DataError(problem, where=str(root), found=found, fix=fix)
            self._clean(gone)
        return len(gone)

    def search(
        self, text: str, k: int = 10, *, mode: Mode = "hybrid", path: str | None = None
    ) -> list[Hit]:
        """The passages that answer a question best, the best first.

        Args:
            text: the question.
            k: how many.
            mode: `hybrid`: by words (BM25) and by vectors, fused by reciprocal rank; or one alone.
            path: only files that are, or lie below, what this pattern names: `guide`, `*.md`.

        Raises:
            DataError: an empty question, or no Unicode. RunError: no index; its vectors are of
                another model than the encoder is now.
        """
        check_question(text, k, path)

        def read() -> list[Hit]:
            info, store = self._open()
            where = matching(path) if path else None
            candidates = max(_CANDIDATES, 5 * k) if mode == "hybrid" else k
            vector_D = None
            if mode != "keywords":
                vector_D = self._encoder_of(info).vectors([text], "query")[0]
            rankings = []
            with readable(self.db):
                store = store.pinned()
                if vector_D is not None:
                    rankings.append(store.by_vector(vector_D, candidates, where, info.nprobes))
                if mode != "vectors":
                    rankings.append(store.by_words(text, candidates, where))
                best = (fused(rankings) if mode == "hybrid" else rankings[0])[:k]
                rows = store.rows([number for number, _ in best]) if best else {}
            return hits_of(best, rows, text)

        return self._reading(read)

    def lend(self, name: str, model: SentenceTransformer) -> None:
        """Let questions be read by a model that is loaded already, as `load(name)` gives it."""
        from llm2comp.use.index.encoding import Encoder

        self._encoder = Encoder(name, model=model)

    def migrate(self, model: str | Path) -> int:
        """Embed all passages anew with another encoder, then change to it.

        The index answers with the old vectors until the end; what was interrupted goes on.

        Returns how many passages are longer, in its own tokens, than the encoder reads.

        Raises:
            RunError: no index; another process writes to it. As `llm2comp.load`.
        """
        info, old = self._open()
        with writing(self.db):
            self._asked, long = place_of(model), 0
            encoder = self._encoder_of(None)
            if info.same_model(encoder.identity.name, encoder.identity.revision):
                changed = replace(info, model=encoder.name)
            else:
                size = min(info.passage_tokens, encoder.room)  # of files to come
                changed = encoder.described(size, info.overlap)
                new = Store(self.db, changed.table, changed.dimensions)
                long = copy(old, new, encoder)
                nprobes, recall = new.finish()
                changed = replace(changed, nprobes=nprobes, recall=recall)
            write_info(self.db, changed)
            drop_other_tables(self.db, changed.table)
        return long

    # ---- inside

    def _open(self) -> tuple[Info, Store]:
        """The index as it is now: another process may have changed its model."""
        info = require_info(self.db)
        store = self._store  # a server asks in several threads
        if store is None or store.name != info.table:
            with readable(self.db):
                store = self._store = Store(self.db, info.table)
        return info, store

    def _reading(self, read: Callable[[], T]) -> T:
        """What it gives; once more where another process has put another table in its place."""
        try:
            return read()
        except RunError:
            self._store = None
            return read()

    def _known(self, root: Path) -> dict[str, FileState]:
        """What the index holds of the files below a folder, or of a file."""
        if not is_unicode(str(root)) or read_info(self.db) is None:  # no such name is indexed
            return {}
        with readable(self.db):
            return self._open()[1].files(root)

    def _encoder_of(self, info: Info | None) -> Encoder:
        """The encoder, loaded when first needed, and again when the index has changed its model.

        Raises RunError unless the vectors of the index (None: a new one) are its own.
        """
        name = self._asked or (info.model if info else GENERAL)
        if self._encoder is None or self._encoder.name != name:
            from llm2comp.use.index.encoding import Encoder

            self._encoder = Encoder(name, self._device)
        who = self._encoder.identity
        if info is not None and not info.same_model(who.name, who.revision):
            raise RunError(
                "the vectors are of another model",
                where=str(self.db),
                expected=f"{info.name}, revision {info.revision}",
                found=f"{who.name}, revision {who.revision}",
                fix=f"llm2comp index --migrate {name} --db {self.db}",
            )
        return self._encoder

    def _begin(self) -> tuple[Info, Store, Encoder]:
        """The index and its encoder; both are made where there is none."""
        info = read_info(self.db)
        encoder = self._encoder_of(info)
        if info is None:
            info = encoder.described(self._size, self._overlap)
            self._store = Store(self.db, info.table, info.dimensions)
            write_info(self.db, info)
        return *self._open(), encoder

    def _update(self, root: Path, files: list[Path], report: Report) -> Added:
        known = self._known(root)
        todo = [path for path in files if not unchanged(path, known.get(str(path)))]
        same = len(files) - len(todo)
        report.there, report.used = same, same
        unreadable = fill(todo, root, report, self._begin)
        if not report.used and not known:
            raise DataError(
                "nothing in it can be read", where=report.source, found=report.left_out()
            )
        gone = known.keys() - ({str(path) for path in files} - unreadable)
        if todo or gone:
            self._clean(gone)
        left = len(self._open()[1])
        return Added(report, len(todo) - len(unreadable), same, len(gone), left)

    def _clean(self, gone: Iterable[str]) -> None:
        """Take files out, and bring the indexes of the table up to date."""
        info, store = self._open()
        store.remove(gone)
        nprobes, recall = store.finish()
        write_info(self.db, replace(info, nprobes=nprobes, recall=recall))

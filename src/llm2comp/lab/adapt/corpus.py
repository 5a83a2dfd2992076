"""A user's documents as files of a run: held-out tasks in BEIR's layout, pairs to train on.

runs/x/data/held-out/retrieval/held-out/       what the verdict is given on
runs/x/data/validation/retrieval/validation/   what chooses the checkpoint: other documents
runs/x/data/pairs.jsonl                        what is trained on
runs/x/data/passages.jsonl                     what stage 1 reads, where there is one
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from llm2comp.data.documents import Offsets, Report
from llm2comp.data.weak_pairs import (
    Split,
    Task,
    Weak,
    WeakPair,
    hold_out,
    read_units,
    training_pairs,
)
from llm2comp.errors import DataError
from llm2comp.system.console import say
from llm2comp.system.files import to_json, write_text

# Most of what the verdict is given on, and of what chooses the checkpoint.
TEST, VALIDATION = (400, 1000), (100, 200)
# Tokens of a passage that is searched for, and of one that is trained on: shorter ones are more.
PASSAGE_TOKENS, TRAINED_TOKENS = 128, 64
LEAST_QUERIES, LEAST_PAIRS = 5, 16
DATA_FOLDER, PAIRS_FILE, PASSAGES_FILE = "data", "pairs.jsonl", "passages.jsonl"
HELD_OUT, VALIDATING = "held-out", "validation"


@dataclass(frozen=True)
class Corpus:
    """Documents, split, and how they are cut.

    Args:
        source: the folder, a file, or `builtin:python-docs`.
        split: the documents by what they are for.
        weak: what makes tasks of them.
        short: what makes pairs of them, of shorter passages.
        digest: of all their text: another one is another corpus.
    """

    source: str
    split: Split
    weak: Weak
    short: Weak
    digest: str

    @classmethod
    def read(cls, source: str, offsets: Offsets) -> Corpus:
        """Read and split; says what was found.

        Raises:
            DataError: nothing that can be read, or too little to hold any out.
        """
        report = Report(source)
        units = read_units(source, report)
        split = hold_out(units, source)
        say(report.summary())
        say(
            f"{split.of}: {len(split.test):,} held out for the verdict, {len(split.validation):,} "
            f"for choosing a checkpoint, {len(split.train):,} to train on"
        )
        texts = "\0".join(block.text for unit in units for block in unit.blocks)
        digest = hashlib.sha256(texts.encode("utf-8", "replace")).hexdigest()
        weak, short = (Weak(units, offsets, n) for n in (PASSAGE_TOKENS, TRAINED_TOKENS))
        return cls(source, split, weak, short, digest)

    def tasks(
        self, test: tuple[int, int] = TEST, validation: tuple[int, int] = VALIDATION
    ) -> tuple[Task, Task]:
        """The held-out task and the one that chooses, of so many queries and passages at most.

        Raises:
            DataError: hardly a passage with something that asks for it.
        """
        judged = self.weak.task(self.split.test, *test)
        chooser = self.weak.task(self.split.validation, *validation)
        if len(judged.queries) < LEAST_QUERIES or not chooser.queries:
            raise DataError(
                "too few queries can be made of the held-out documents",
                where=self.source,
                expected=f"{LEAST_QUERIES} headings, or passages of several sentences, or more",
                found=f"{len(judged.queries)}, and {len(chooser.queries)} to choose by",
                fix="add documents, or ones with headings",
            )
        return judged, chooser

    def passages(self, held_out: Sequence[Task], most: int) -> list[str]:
        """At most so many passages to train on, near to nothing held out nor to each other."""
        texts = (WeakPair("", text, text) for text in self.weak.passages(self.split.train))
        return [pair.passage for pair in training_pairs(texts, held_out, most)]

    def pairs(
        self, held_out: Sequence[Task], most: int, written: Sequence[WeakPair] = ()
    ) -> list[WeakPair]:
        """At most so many pairs to train on, nothing held out among them.

        Written questions come first. Pairs of neighbours come in where there are too few that begin
        with a query.

        Raises:
            DataError: hardly any.
        """
        kinds_in_order = (
            (pair for pair in self.short.pairs(self.split.train) if (pair.kind == "next") == last)
            for last in (False, True)
        )
        every = chain(written, chain.from_iterable(kinds_in_order))
        found = training_pairs(every, held_out, most)
        if len(found) < LEAST_PAIRS:
            raise DataError(
                "too few pairs can be made of the documents",
                where=self.source,
                expected=f"{LEAST_PAIRS} or more headings, sentences or passages in a row",
                found=len(found),
            )
        return found


def kinds(rows: Iterable[Mapping[str, Any]]) -> str:
    """Of rows, for people: `320 heading, 118 opening`."""
    return ", ".join(f"{n:,} {kind}" for kind, n in Counter(r["kind"] for r in rows).most_common())


def rows_of(pairs: Iterable[WeakPair]) -> list[dict[str, Any]]:
    """Pairs as rows of a file."""
    return [{"anchor": p.query, "positive": p.passage, "kind": p.kind} for p in pairs]


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines in one step."""
    write_text(file, "".join(f"{to_json(row, ensure_ascii=False)}\n" for row in rows))
    return file


def read_task(folder: Path, name: str) -> Task | None:
    """A task that `write_task` wrote; None where there is none."""
    place = folder / "retrieval" / name
    if not (place / "qrels" / "test.tsv").is_file():
        return None
    task = Task()
    for file, named in (("corpus", task.documents), ("queries", task.queries)):
        rows = (place / f"{file}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        named.update((row["_id"], row["text"]) for row in map(json.loads, rows))
    for line in (place / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, _ = line.split("\t")
        task.relevant.setdefault(query, set()).add(document)
    return task


def write_task(task: Task, folder: Path, name: str) -> Path:
    """Write a task as a local set (docs/evaluate.md). Returns the folder of sets."""
    place = folder / "retrieval" / name
    texts = {"corpus": task.documents, "queries": task.queries}
    for file, named in texts.items():
        write_rows(place / f"{file}.jsonl", ({"_id": i, "text": text} for i, text in named.items()))
    lines = [f"{q}\t{d}\t1" for q, found in task.relevant.items() for d in sorted(found)]
    head = "query-id\tcorpus-id\tscore"
    write_text(place / "qrels" / "test.tsv", "\n".join([head, *lines]) + "\n")
    return folder

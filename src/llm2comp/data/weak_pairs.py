"""Documents without labels → held-out documents, and weak pairs of the others.

    units      documents, or their sections where there are few of them
    held out   a fifth of them by a hash of their text, before all else → Task, to be judged by
    pairs      of the others: a query and a passage that answers it     → WeakPair, to train on

    question  a heading that asks                   → the passage below it
    heading   a title or heading                    → the passage below it
    opening   first sentence, or docstring summary  → the rest of its passage
    next      a passage                             → the passage after it (for training alone)

A heading that stands over several sections is put behind the document's title; one that is still
not alone says too little, and is left out. So are names in source code and page numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llm2comp.data import python_docs
from llm2comp.data.documents import Block, Document, Offsets, Passage, Report, documents, passages
from llm2comp.errors import DataError

PYTHON_DOCS = "builtin:python-docs"
LEAST_UNITS = 10
# A passage to be found has so many characters at least; a query so many words at most.
LEAST_CHARACTERS, MOST_WORDS = 80, 60
# A heading over more passages than a search is judged by says too little of each to ask for them.
MOST_ANSWERS = 10
# Words in a row that are compared, and the share of them that makes two texts near duplicates.
SHINGLE_WORDS, ALIKE = 5, 0.6
_ROWS = (".jsonl",)
# Kinds of files whose headings are names in source code, or page numbers: nobody asks by them.
_LABELLED = (".py", ".pdf")
_SENTENCE = re.compile(r"(?<=[.!?…])\s+(?=\S)")


@dataclass(frozen=True)
class WeakPair:
    """A query and the passage that answers it; `kind` is the rule that made it."""

    kind: str
    query: str
    passage: str


@dataclass
class Task:
    """Held-out documents to be searched: ids → texts, and what answers a query."""

    queries: dict[str, str] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    relevant: dict[str, set[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """Documents by what they are for; each part in the order of their hashes."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    test: tuple[Document, ...]
    of: str  # documents, or sections


def read_units(source: str, report: Report) -> list[Document]:
    """Documents of a folder, a file or `builtin:python-docs`; each row of a .jsonl is one.

    Raises:
        DataError: nothing there that can be read; says why.
    """
    if source == PYTHON_DOCS:
        found = [
            Document(Path(entry.name), (Block(entry.text, (), 1, 1 + entry.text.count("\n")),))
            for entry in python_docs.entries()
        ]
        report.there = report.used = len(found)
        return found
    units: list[Document] = []
    for document in documents(Path(source), report):
        if document.path.suffix.lower() in _ROWS:
            units += [Document(document.path, (block,)) for block in document.blocks]
        else:
            units.append(document)
    if not units:
        why = f"left out: {report.left_out()}" if report.skipped else "it is empty"
        raise DataError("no document that can be read", where=source, found=why)
    return units


def hold_out(units: Sequence[Document], where: str) -> Split:
    """Set a fifth of the documents apart, and a tenth of the others for choosing a checkpoint.

    Which ones is decided by a hash of their text, so neither names nor order matter. Of fewer than
    ten documents their sections are held out.

    Raises:
        DataError: too few to hold any out.
    """
    of = "documents"
    if len(units) < LEAST_UNITS:
        of = "sections"
        units = [Document(unit.path, section) for unit in units for section in unit.sections]
    distinct = {_digest(unit): unit for unit in units}
    if len(distinct) < LEAST_UNITS:
        raise DataError(
            "too few documents to hold some out",
            where=where,
            expected=f"{LEAST_UNITS} documents, or sections under headings, or more",
            found=len(distinct),
            fix="add documents; with so few, search by words (BM25) does well",
        )
    ordered = [distinct[key] for key in sorted(distinct)]
    tested = max(2, len(ordered) // 5)
    chosen = max(1, (len(ordered) - tested) // 10)
    test, validation = ordered[:tested], ordered[tested : tested + chosen]
    return Split(tuple(ordered[tested + chosen :]), tuple(validation), tuple(test), of)


class Weak:
    """Makes pairs and tasks of documents, all cut in the same way.

    Args:
        units: all documents, held out or not: which headings are alone is counted over them.
        offsets: the encoder's tokenizer, as `passages` takes it.
        size: most tokens of a passage.
    """

    def __init__(self, units: Iterable[Document], offsets: Offsets, size: int) -> None:
        self.offsets, self.size = offsets, size
        headings = [section[0].headings for unit in units for section in unit.sections]
        self._alone = Counter(normal(h[-1]) for h in headings if h)
        self._titled = Counter(normal(f"{h[0]}: {h[-1]}") for h in headings if h)

    def pairs(self, units: Iterable[Document]) -> Iterator[WeakPair]:
        """All pairs of documents, near duplicates among them included."""
        for unit in units:
            for section in self._sections(unit):
                if heading := self._heading(unit, section[0]):
                    kind = "question" if heading.rstrip().endswith("?") else "heading"
                    yield WeakPair(kind, heading, section[0].text)
                for passage in section:
                    if opened := opening(passage.text):
                        yield WeakPair("opening", *opened)
                for one, other in zip(section, section[1:], strict=False):
                    yield WeakPair("next", one.text, other.text)

    def passages(self, units: Iterable[Document]) -> Iterator[str]:
        """All passages of documents."""
        for unit in units:
            for section in self._sections(unit):
                yield from (passage.text for passage in section)

    def task(self, units: Iterable[Document], most_queries: int, most_documents: int) -> Task:
        """A task of held-out documents: all of their passages, and a query for as many as have one.

        A passage is asked for by its heading, all passages of its section being right if they are
        ten or fewer, or by its opening, which it then begins without. Near duplicates are left out.
        """
        task, seen = Task(), Seen()
        for unit in units:
            for section in self._sections(unit):
                if max(len(task.queries) / most_queries, len(task.documents) / most_documents) >= 1:
                    return task
                few = len(section) <= MOST_ANSWERS
                heading, asked = self._heading(unit, section[0]) if few else None, set[str]()
                for number, passage in enumerate(section):
                    opened = None if number == 0 and heading else opening(passage.text)
                    text = opened[1] if opened else passage.text
                    if len(text) < LEAST_CHARACTERS or seen.alike(text):
                        continue
                    seen.add(text)
                    name = f"d{len(task.documents):05}"
                    task.documents[name] = text
                    asked.add(name)
                    if opened and len(task.queries) < most_queries:
                        _ask(task, opened[0], {name})
                if heading and asked:
                    _ask(task, heading, asked)
        return task

    def _sections(self, unit: Document) -> Iterator[list[Passage]]:
        for section in unit.sections:
            yield passages(Document(unit.path, section), self.offsets, self.size, overlap=0)

    def _heading(self, unit: Document, passage: Passage) -> str | None:
        """What asks for a section; None for a name in code, a page number, and one of several."""
        if not passage.headings or unit.path.suffix.lower() in _LABELLED:
            return None
        last, whole = passage.headings[-1], f"{passage.headings[0]}: {passage.headings[-1]}"
        if self._alone[normal(last)] == 1 and len(last.split()) > 1:
            return last if len(last.split()) <= MOST_WORDS else None
        alone = len(passage.headings) > 1 and self._titled[normal(whole)] == 1
        return whole if alone and len(whole.split()) <= MOST_WORDS else None


class Seen:
    """Texts by their words in a row, to find near duplicates."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, ...]] = set()

    def alike(self, text: str) -> bool:
        """Whether most of a text was seen before."""
        rows = _shingles(text)
        return bool(rows) and len(rows & self._seen) >= ALIKE * len(rows)

    def add(self, text: str) -> None:
        """Remember a text."""
        self._seen |= _shingles(text)


def training_pairs(
    pairs: Iterable[WeakPair], held_out: Iterable[Task], most: int
) -> list[WeakPair]:
    """The first so many pairs that are fit to train on.

    Left out are those near to a held-out text or query, near duplicates of one another's passages
    under the same rule, and passages of a few words.
    """
    apart, seen, queries = Seen(), dict[str, Seen](), set[str]()
    for task in held_out:
        queries |= {normal(query) for query in task.queries.values()}
        for text in (*task.documents.values(), *task.queries.values()):
            apart.add(text)
    found: list[WeakPair] = []
    for pair in pairs:
        own = seen.setdefault(pair.kind, Seen())
        quoted = apart.alike(pair.passage) or normal(pair.query) in queries
        if quoted or len(pair.passage) < LEAST_CHARACTERS or own.alike(pair.passage):
            continue
        if pair.kind == "next" and apart.alike(pair.query):
            continue
        own.add(pair.passage)
        queries.add(normal(pair.query))
        found.append(pair)
        if len(found) == most:
            break
    return found


def opening(text: str) -> tuple[str, str] | None:
    """A text's first paragraph or sentence, and the rest; None where one of them is too short."""
    first, _, rest = text.partition("\n\n")
    if not rest or len(first.split()) > MOST_WORDS:
        parts = _SENTENCE.split(text, maxsplit=1)
        first, rest = parts[0], parts[1] if len(parts) > 1 else ""
    words = re.findall(r"\w+", first)
    begins = (
        first[:1].isalpha() and not first[:1].islower()
    )  # no piece of a list, table or sentence
    fits = begins and len(words) >= 4 and len(first.split()) <= MOST_WORDS
    return (" ".join(first.split()), rest) if fits and len(rest) >= LEAST_CHARACTERS else None


def normal(text: str) -> str:
    """Lower case, white space collapsed."""
    return " ".join(text.lower().split())


def _ask(task: Task, query: str, answers: set[str]) -> None:
    name = f"q{len(task.queries):05}"
    task.queries[name], task.relevant[name] = query, answers


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(last)} if words else set()


def _digest(unit: Document) -> str:
    text = normal("\n".join(block.text for block in unit.blocks))
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).hexdigest()

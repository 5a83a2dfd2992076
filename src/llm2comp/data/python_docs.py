"""`builtin:python-docs`: the Python standard library's documentation on the user's machine.

    language reference (pydoc_data.topics)  ─┐
    docstrings in the library's .py files   ─┼→ entries → pairs     a summary and what follows
    __doc__ of modules written in C         ─┘          → passages  texts to train on
                                                        → retrieval the held-out fifth, to search

Only stdlib modules written in C are imported (their docs exist nowhere else); Python files are
parsed, never run.

The held-out split. Docstrings that share a normalised summary or a normalised body (lower case,
white space collapsed) form a group, also through others (union-find). A group is held out when the
64-bit BLAKE2b of its smallest normalised text is a multiple of 5: the same on every machine with
the same Python. Topics are never held out. A training text or pair is left out if it quotes,
whatever the punctuation, a held-out summary, a held-out body, or a paragraph of at least 12 words
of such a body.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from llm2comp.data.docstrings import (
    Entry,
    _compiled_docs,
    _entry,
    _paragraphs,
    _source_docs,
    _topic_docs,
    normalise,
)

T = TypeVar("T")
# first words of a phrase → all its words
Phrases: TypeAlias = dict[tuple[str, ...], list[tuple[str, ...]]]

_PHRASE_START_WORDS = 4
_QUOTED_PARAGRAPH_WORDS = 12


@dataclass(frozen=True)
class Retrieval:
    """A search task: which documents are the right answers to which query."""

    queries: dict[str, str]
    documents: dict[str, str]
    relevant: dict[str, set[str]]
    names: dict[str, str]


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Everything documented, sorted by qualified name; of several docs under one name the longest.

    A name is the public one: `_heapq.heappush` counts as `heapq.heappush`, `posix.stat` as
    `os.stat`.
    """
    found: dict[str, Entry] = {}
    for name, kind, doc in (*_topic_docs(), *_source_docs(), *_compiled_docs()):
        entry = _entry(name, kind, doc)
        if entry and (
            name not in found
            or (len(entry.text), entry.text) > (len(found[name].text), found[name].text)
        ):
            found[name] = entry
    return tuple(found[name] for name in sorted(found))


def pairs(heldout: bool) -> list[tuple[str, str]]:
    """Distinct (summary, body) of docstrings, from the held-out groups or from the others.

    A summary has 4 to 60 words; the words of a body, leaving out doctests, make at least 80
    characters.
    """
    chosen = [
        entry
        for entry in entries()
        if _is_pair(entry) and _split()[normalise(entry.summary)] == heldout
    ]
    distinct = _first_of_each(
        ((normalise(entry.summary), normalise(entry.body)), entry) for entry in chosen
    )
    return [
        (entry.summary, entry.body)
        for entry in distinct
        if heldout or not quotes_held_out(entry.text)
    ]


def passages() -> list[str]:
    """Distinct texts of 4 words and more to train on, nothing held out.

    They are entries, cut at paragraph ends if long.
    """
    cut = (
        passage for entry in entries() for passage in _cut(entry.text) if len(_words(passage)) >= 4
    )
    return _first_of_each(
        (normalise(passage), passage) for passage in cut if not quotes_held_out(passage)
    )


def retrieval() -> Retrieval:
    """Make the held-out fifth a search task: distinct summaries are queries, bodies documents.

    Every body that stands under a summary anywhere in the fifth is relevant to it.
    """
    held_out = [
        (normalise(summary), normalise(body), summary, body)
        for summary, body in pairs(heldout=True)
    ]
    qids = {
        key: f"q{number:04}" for number, key in enumerate(dict.fromkeys(row[0] for row in held_out))
    }
    docids = {
        key: f"d{number:04}" for number, key in enumerate(dict.fromkeys(row[1] for row in held_out))
    }
    names = {normalise(entry.body): entry.name for entry in reversed(entries())}
    task = Retrieval({}, {}, {}, {docid: names[key] for key, docid in docids.items()})
    for query, document, summary, body in held_out:
        task.queries.setdefault(qids[query], summary)
        task.documents.setdefault(docids[document], body)
        task.relevant.setdefault(qids[query], set()).add(docids[document])
    return task


def functions() -> list[tuple[str, str]]:
    """(qualified name, documentation) of all functions, classes and methods, for a search to show.

    Of equal docs one is kept.
    """
    members = _first_of_each(
        (normalise(entry.text), entry) for entry in entries() if entry.kind == "member"
    )
    return [(entry.name, entry.text) for entry in members]


def quotes_held_out(text: str) -> bool:
    """Whether a text holds the words, in order, of a held-out summary, body or long paragraph."""
    words, phrases = _words(text), _held_out_phrases()
    return any(
        words[start : start + len(phrase)] == phrase
        for start in range(len(words) - _PHRASE_START_WORDS + 1)
        for phrase in phrases.get(words[start : start + _PHRASE_START_WORDS], ())
    )


def _first_of_each(keyed: Iterable[tuple[Hashable, T]]) -> list[T]:
    """In the given order, the first value of each key."""
    first: dict[Hashable, T] = {}
    for key, value in keyed:
        first.setdefault(key, value)
    return list(first.values())


def _is_pair(entry: Entry) -> bool:
    prose = " ".join(
        line for line in entry.body.splitlines() if not line.lstrip().startswith((">>>", "..."))
    )
    enough = (
        min(len(_words(entry.summary)), len(_words(prose))) >= _PHRASE_START_WORDS
        and len(" ".join(_words(prose))) >= 80
    )
    return entry.kind != "topic" and enough and 4 <= len(entry.summary.split()) <= 60


@functools.cache
def _split() -> dict[str, bool]:
    """Each normalised text of a docstring → whether its group is held out."""
    parent: dict[str, str] = {}

    def find(text: str) -> str:  # the smallest text of the group
        while parent.setdefault(text, text) != text:
            parent[text] = parent[parent[text]]
            text = parent[text]
        return text

    for entry in entries():
        if entry.kind != "topic":
            smaller, larger = sorted(
                (find(normalise(entry.summary)), find(normalise(entry.body or entry.summary)))
            )
            parent[larger] = smaller
    return {
        text: int(hashlib.blake2b(find(text).encode(), digest_size=8).hexdigest(), 16) % 5 == 0
        for text in parent
    }


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


@functools.cache
def _held_out_phrases() -> Phrases:
    """Word sequences that no training text may contain, found by their first words."""
    phrases: set[tuple[str, ...]] = set()
    for summary, body in pairs(heldout=True):
        phrases |= {_words(summary), _words(body)}
        phrases |= {
            words
            for words in map(_words, _paragraphs(body))
            if len(words) >= _QUOTED_PARAGRAPH_WORDS
        }
    index: Phrases = {}
    for phrase in sorted(phrases):
        index.setdefault(phrase[:_PHRASE_START_WORDS], []).append(phrase)
    return index


def _cut(text: str) -> Iterator[str]:
    """Pieces of about 600 to 1,800 characters, cut at paragraph ends.

    A longer paragraph is cut at line ends.
    """
    least, most = 600, 1800
    paragraphs = (f"{paragraph}\n\n" for paragraph in _paragraphs(text))
    parts = (
        part
        for text in paragraphs
        for part in ([text] if len(text) <= most else text.splitlines(keepends=True))
    )
    piece = ""
    for part in parts:
        if len(piece) >= least and len(piece) + len(part) > most:
            yield piece.rstrip()
            piece = ""
        piece += part
    if piece:
        yield piece.rstrip()

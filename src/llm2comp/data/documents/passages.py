"""A document → passages: a few sentences each, none over a number of tokens, with where they are.

A passage never goes over a heading. Neighbours under one heading overlap, so that a sentence at an
end is whole in one of them. Where there is a choice a passage ends with a paragraph, a line or a
sentence.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from llm2comp.data.documents.blocks import Block, Document, Headings

# A text → where its tokens begin and end in it.
Offsets = Callable[[str], Sequence[tuple[int, int]]]
SIZE, OVERLAP = 256, 32
_ENDS = (re.compile(r"\n\n"), re.compile(r"\n"), re.compile(r"[.!?…]\s"), re.compile(r"\s"))
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class Passage:
    """A part of a document: its text, the headings above it, its first and last line."""

    text: str
    headings: Headings
    first: int
    last: int

    @property
    def in_context(self) -> str:
        """The text below its headings: what is embedded and searched."""
        return _head(self.headings) + self.text


def passages(
    document: Document,
    offsets: Offsets,
    size: int = SIZE,
    overlap: int = OVERLAP,
    room: int | None = None,
) -> list[Passage]:
    """Cut a document.

    Args:
        document: what was read.
        offsets: the encoder's tokenizer: a text → a (begin, end) for each of its tokens.
        size: most tokens of a passage's text.
        overlap: about how many tokens at the end of a passage begin the next one too.
        room: most tokens of a passage below its headings; None: any. Headings take half of it at
            most: the outermost are left out of longer ones.
    """
    return [
        passage
        for section in document.sections
        for passage in _cut(section, offsets, size, overlap, room)
    ]


def _cut(
    section: Sequence[Block], offsets: Offsets, size: int, overlap: int, room: int | None
) -> Iterator[Passage]:
    headings = section[0].headings
    if room is not None:
        while headings and len(offsets(_head(headings))) > room // 2:
            headings = headings[1:]
        size = min(size, room - len(offsets(_head(headings))))
    overlap, head = min(overlap, size // 2), _head(headings)

    text = _BETWEEN.join(block.text for block in section)
    lengths = (len(block.text) + len(_BETWEEN) for block in section)
    starts = [0, *accumulate(lengths)][:-1]
    breaks = [match.start() for match in re.finditer("\n", text)]
    # of the others the lines are not those of a file
    exact = [block.text.count("\n") == block.last - block.first for block in section]

    def line(at: int, end: bool) -> int:
        number = bisect_right(starts, at) - 1
        block = section[number]
        if not exact[number]:
            return block.last if end else block.first
        return block.first + bisect_left(breaks, at) - bisect_left(breaks, starts[number])

    spans = [span for span in offsets(text) if text[slice(*span)].strip()]

    def too_long(stop: int) -> bool:
        part = text[spans[begin][0] : spans[stop - 1][1]]
        whole = room is None or not head or len(offsets(head + part)) <= room
        return not (whole and len(offsets(part)) <= size)

    begin = 0
    while begin < len(spans):
        stop = min(begin + size, len(spans))
        # cut out, a text may have more tokens than it had in its place; those of white space count
        if too_long(stop):
            stop = begin + 1 + bisect_left(range(begin + 2, stop + 1), True, key=too_long)
        if stop < len(spans):
            stop = _good_end(text, spans, begin + max(1, (stop - begin) * 3 // 4), stop)
        a, b = spans[begin][0], spans[stop - 1][1]
        a += len(text[a:b]) - len(text[a:b].lstrip())
        kept = text[a:b].rstrip()
        yield Passage(kept, headings, line(a, False), line(a + len(kept) - 1, True))
        if stop == len(spans):
            return
        begin = max(begin + 1, _word_start(text, spans, stop - overlap, stop))


def _head(headings: Headings) -> str:
    return f"{' > '.join(headings)}\n" if headings else ""


def _good_end(text: str, spans: Sequence[tuple[int, int]], least: int, most: int) -> int:
    """The number of tokens, of those allowed, after which a text is best cut."""
    low, high = spans[least - 1][1], spans[most][0] + 1
    for ending in _ENDS:
        found = [match.end() for match in ending.finditer(text, low, high)]
        if found:
            return max(n for n in range(least, most + 1) if spans[n - 1][1] <= found[-1])
    return most


def _word_start(text: str, spans: Sequence[tuple[int, int]], least: int, most: int) -> int:
    """The first token from `least` on that begins a word; `most` where none does."""
    starts = (
        n
        for n in range(least, most)
        if text[spans[n][0]].isspace() or text[spans[n][0] - 1].isspace()
    )
    return next(starts, most)

"""What a document is once it is read: blocks of text under headings, with their lines."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import TypeAlias

Headings: TypeAlias = tuple[str, ...]
_HEADING_CHARACTERS = 200


@dataclass(frozen=True)
class Block:
    """A paragraph, list, table, docstring, ... of a document.

    Args:
        text: its text.
        headings: the headings above it, the outermost first.
        first, last: its lines in the file, from 1. Of a PDF they count pages, of a .docx
            paragraphs.
    """

    text: str
    headings: Headings
    first: int
    last: int


@dataclass(frozen=True)
class Document:
    """A file that was read.

    Args:
        path: where it lies.
        blocks: its text, in order; one block at least.
        left_out: which of its rows were left out and why; empty: none.
    """

    path: Path
    blocks: tuple[Block, ...]
    left_out: str = ""

    @property
    def title(self) -> str:
        """The outermost heading of its first block, or else the name of the file."""
        headings = self.blocks[0].headings
        return headings[0] if headings else self.path.stem

    @property
    def sections(self) -> list[tuple[Block, ...]]:
        """Its blocks, neighbours under the same headings together."""
        found: list[list[Block]] = []
        for block in self.blocks:
            if not found or found[-1][-1].headings != block.headings:
                found.append([])
            found[-1].append(block)
        return [tuple(section) for section in found]


def under(above: Mapping[int, str], level: int, title: str) -> dict[int, str]:
    """Headings by their levels, of which some may be left out, below a new one; a very long one is
    cut.
    """
    kept = {higher: heading for higher, heading in above.items() if higher < level}
    return kept | {level: " ".join(title.split())[:_HEADING_CHARACTERS]}


def paragraphs(lines: Sequence[str], headings: Headings = (), first: int = 1) -> Iterator[Block]:
    """Blocks of plain text: lines between blank lines. `first` is the number of the first line."""
    begin = None
    for number, line in enumerate(chain(lines, [""])):
        if line.strip():
            begin = number if begin is None else begin
        elif begin is not None:
            text = "\n".join(lines[begin:number])
            yield Block(text, headings, first + begin, first + number - 1)
            begin = None


def placed(blocks: Iterable[Block], source: str) -> Iterator[Block]:
    """Blocks of a parser that tells no lines, at the line of the source where each begins.

    It is found by the first plain words of a block; one that is not found stands at the line of
    the block before.
    """
    starts = [0, *accumulate(len(line) + 1 for line in source.split("\n"))]
    flat, at = re.sub(r"\s", " ", source), 0
    for block in blocks:
        words = re.search(r"\w[\w ,]{0,40}", block.text)
        at = max(at, flat.find(words[0].strip(), at) if words else 0)
        line = bisect_right(starts, at)
        yield replace(block, first=line, last=line)

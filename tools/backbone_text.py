"""Reading text corpora, and holding back the paragraphs that the embedded backbone may not be
trained on.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

MIN_EXCLUDED = 31  # characters of a text of an `--exclude` file
KEY_WORDS = 5  # first words of an excluded text, by which it is found
WORD = re.compile(r"\w+")


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file, compressed if its name ends in `.zst`.

    Raises SystemExit if it is missing or damaged.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: no such file")
    try:
        with path.open("rb") as raw:
            stream = (
                zstandard.ZstdDecompressor().stream_reader(raw) if path.suffix == ".zst" else raw
            )
            yield from io.TextIOWrapper(stream, encoding="utf-8")
    except (zstandard.ZstdError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path}: damaged, or not zstandard and UTF-8: {error}") from error


def read_corpus(
    path: Path, fields: tuple[str, ...] = ("source", "license", "text")
) -> Iterator[Any]:
    """Rows of one `.jsonl` or `.jsonl.zst` file.

    Raises SystemExit at a row that is no JSON or lacks one of `fields`.
    """
    for number, line in enumerate(read_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{path}, line {number}: no JSON ({error})") from error
        if any(not isinstance(row, dict) or not isinstance(row.get(name), str) for name in fields):
            raise SystemExit(
                f"{path}, line {number}: expected an object with the texts {', '.join(fields)}"
            )
        yield row


def fingerprint(paragraph: str) -> bytes:
    """Equal for paragraphs that differ only in case and white space."""
    return hashlib.blake2b(" ".join(paragraph.lower().split()).encode(), digest_size=8).digest()


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, one for each of its lines."""
    if isinstance(value, str):
        yield from (line.strip() for line in value.splitlines())
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def read_excluded(path: Path) -> Iterator[str]:
    """The texts of an evaluation file: all strings of `.jsonl` and `.jsonl.zst`, else every line;
    only the long ones.
    """
    values: Iterable[Any] = (
        read_corpus(path, fields=()) if ".jsonl" in path.suffixes else read_lines(path)
    )
    yield from (text for value in values for text in strings(value) if len(text) >= MIN_EXCLUDED)


class Excluded:
    """Texts that no paragraph may contain, found through their first words."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.keys: dict[int, dict[tuple[str, ...], set[str]]] = defaultdict(
            lambda: defaultdict(set)
        )
        for text in texts:
            if words := WORD.findall(text.lower()):
                key = tuple(words[:KEY_WORDS])
                self.keys[len(key)][key].add(f" {' '.join(words)} ")

    def __len__(self) -> int:
        return sum(len(texts) for keys in self.keys.values() for texts in keys.values())

    def inside(self, paragraph: str) -> bool:
        """Whether the paragraph contains one of the texts, word by word."""
        if not self.keys:
            return False
        words = WORD.findall(paragraph.lower())
        joined = f" {' '.join(words)} "
        for length, keys in self.keys.items():
            if keys.keys().isdisjoint(zip(*(words[i:] for i in range(length)), strict=False)):
                continue
            found = keys.keys() & set(zip(*(words[i:] for i in range(length)), strict=False))
            if any(text in joined for key in found for text in keys[key]):
                return True
        return False


class Sieve:
    """Lets a paragraph through that is new, not held out and not excluded; counts the others in
    `dropped`.
    """

    def __init__(self, heldout: set[bytes], excluded: Excluded) -> None:
        self.seen, self.heldout, self.excluded = set[bytes](), heldout, excluded
        self.dropped: Counter[str] = Counter({"repeated": 0, "held out": 0, "excluded": 0})

    def passes(self, paragraph: str) -> bool:
        """Whether to keep the paragraph; it counts as seen from now on."""
        key = fingerprint(paragraph)
        if key in self.heldout:
            reason = "held out"
        elif key in self.seen:
            reason = "repeated"
        else:
            self.seen.add(key)
            if not self.excluded.inside(paragraph):
                return True
            reason = "excluded"
        self.dropped[reason] += 1
        return False

"""Files of a local evaluation set, row by row, each value checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import DatasetDict
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

from llm2comp.data.tables import file_rows
from llm2comp.errors import DataError
from llm2comp.system.files import is_unicode, sha256

Parts: TypeAlias = DatasetDict | dict[str, RetrievalSplitData]  # split → its data


_COMPRESSIONS = ("", ".gz", ".zst")


_SPLITS = ("test", "dev", "train")


_QRELS = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class CheckedRow:
    """One row and its line number. Every method returns a checked value or raises DataError."""

    where: str
    values: dict[str, Any]

    def value(self, key: str) -> Any:
        """Whatever stands there."""
        if key not in self.values:
            raise DataError(
                f"no key {key!r}", where=self.where, found=", ".join(self.values) or "no key at all"
            )
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
        """A class by its name without outer spaces.

        A whole number (1 or 1.0) counts as its digits, yes or no as a word.
        """
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
        if not is_unicode(value):
            raise self._wrong(key, "a text in UTF-8")
        return value

    def _wrong(self, key: str, expected: str) -> DataError:
        return DataError(
            f"{key!r} is not {expected}", where=self.where, found=ascii(self.values[key])[:80]
        )


class SetFiles:
    """The files of one set. Everything read from them is part of the revision."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: set[Path] = set()

    def find(self, name: str) -> Path | None:
        """The file of that name, plain or compressed.

        Raises DataError if there is more than one.
        """
        found = [
            path for ending in _COMPRESSIONS if (path := self.folder / f"{name}{ending}").is_file()
        ]
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise DataError(
                "the same part twice", where=str(self.folder), found=names, fix="keep one of them"
            )
        return found[0] if found else None

    def evaluated_split(self, pattern: str) -> str:
        """`test`, or `dev` if there is no test part. Raises DataError if there is neither."""
        for split in ("test", "dev"):
            if self.find(pattern.format(split)):
                return split
        raise self._missing(" or ".join(pattern.format(split) for split in ("test", "dev")))

    def rows(self, name: str, *columns: str) -> list[CheckedRow]:
        """All rows of a file; `columns` must be in a table's header.

        Raises DataError if it is missing, unreadable or empty.
        """
        path = self.find(name)
        if path is None:
            raise self._missing(name)
        self._read.add(path)
        try:
            rows = list(self._rows(path, columns))
        except (OSError, pa.ArrowException) as error:
            raise DataError(
                f"cannot be read: {error}", where=str(path), fix="check that the file is whole"
            ) from error
        if not rows:
            raise DataError(
                "no row in it", where=str(path), expected="one row for each item to evaluate"
            )
        return rows

    def revision(self) -> str:
        """First 12 hex digits of the sha256 over names and contents of the files that were read."""
        lines = (
            f"{path.relative_to(self.folder).as_posix()} {sha256(path)}\n"
            for path in sorted(self._read)
        )
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]

    @staticmethod
    def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[CheckedRow]:
        for place, row in file_rows(path, columns):
            where = f"{path}, {place}"
            if isinstance(row, str):
                raise DataError(f"unusable row: {row}", where=where, fix="mend or remove it")
            yield CheckedRow(where, row)

    def _missing(self, expected: str) -> DataError:
        if not self.folder.is_dir():
            return DataError("no such folder", where=str(self.folder))
        names = sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        )
        found = ", ".join(names[:10]) or "no file"
        return DataError(
            "a part is missing",
            where=str(self.folder),
            expected=f"{expected} (plain, .gz or .zst)",
            found=found,
        )

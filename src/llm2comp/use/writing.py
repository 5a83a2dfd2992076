"""Embeddings → a file, written in one step; which rows of their source they are."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from llm2comp.errors import DataError
from llm2comp.system.console import BadRows
from llm2comp.system.files import to_json, write_bytes
from llm2comp.system.folders import refuse_output

if TYPE_CHECKING:
    from llm2comp.data.loaded import Loaded

OUTPUT_FORMATS = (".npy", ".parquet", ".jsonl")


@dataclass(frozen=True)
class Embedded:
    """`embeddings_ND` float32, and how many texts were longer than the model reads."""

    embeddings_ND: NDArray[np.float32]
    long_texts: int


@dataclass(frozen=True)
class Places:
    """Where texts stand in their source: `numbers` (N,) counts its rows from 0, `rows` are all of
    them.

    `zero`: all rows are written, those without a text as zeros; otherwise the texts alone, with
    their numbers.
    """

    numbers: Sequence[int]
    rows: int
    zero: bool = False


def places_of(loaded: Loaded[str], bad_rows: BadRows, source: str) -> Places | None:
    """Where the texts of a source stand, as far as it is to be written.

    Args:
        loaded: what was read.
        bad_rows: what to do where rows have no text that can be embedded: stop; leave them out and
            write the numbers of the others; write zeros in their place.
        source: what an error calls it.

    Raises:
        DataError: rows without a text, under `stop`; names them.
    """
    if bad_rows != "stop":
        return Places(loaded.numbers, loaded.there, bad_rows == "zero")
    refuse_bad_rows(loaded.there, loaded.used, loaded.left_out(), source)
    return None


def refuse_bad_rows(rows: int, texts: int, left_out: str, source: str) -> None:
    """Raise DataError if any of the rows has no text; `left_out` names them."""
    if rows > texts:
        raise DataError(
            f"{rows - texts:,} of {rows:,} rows cannot be embedded",
            where=source,
            found=left_out,
            fix="mend them; or --bad-rows skip (left out, the others keep their row numbers) "
            "or zero (zeros in their place)",
        )


def write_embeddings(
    path: Path, embedded: Embedded, texts: Sequence[str], places: Places | None = None
) -> None:
    """Write .npy (the matrix), .parquet or .jsonl (columns text, embedding), in one step.

    With `places` that are not `zero` there is a column `row` before these, beside .npy a file
    `.rows.npy`; with `zero` a text that there is not is null.

    Raises:
        DataError: another suffix. RunError: not to be replaced, or cannot be written.
    """
    check_output(path)
    if places and places.zero:
        embedded, texts = _spread(embedded, texts, places)  # type: ignore[assignment]
    rows = {"row": list(places.numbers)} if places and not places.zero else {}
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, embedded.embeddings_ND)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        width = embedded.embeddings_ND.shape[1]
        column = pa.FixedSizeListArray.from_arrays(pa.array(embedded.embeddings_ND.ravel()), width)
        pq.write_table(
            pa.table({**rows, "text": pa.array(texts, pa.string()), "embedding": column}), buffer
        )
    else:
        columns = {**rows, "text": texts, "embedding": embedded.embeddings_ND.tolist()}
        lines = (
            dict(zip(columns, values, strict=True))
            for values in zip(*columns.values(), strict=True)
        )
        buffer.write("".join(to_json(line, ensure_ascii=False) + "\n" for line in lines).encode())
    beside = rows_file(path)
    if path.suffix == ".npy":  # row numbers of an earlier file would be wrong beside this one
        beside.unlink(missing_ok=True)
    write_bytes(path, buffer.getvalue())
    if rows and path.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(rows["row"], dtype=np.int64))
        write_bytes(beside, buffer.getvalue())


def rows_file(path: Path) -> Path:
    """Where the row numbers of the embeddings in a .npy stand."""
    return path.with_suffix(".rows.npy")


def _spread(
    embedded: Embedded, texts: Sequence[str], places: Places
) -> tuple[Embedded, list[str | None]]:
    """A row for each of the source: zeros and no text where it had none."""
    all_ND = np.zeros((places.rows, embedded.embeddings_ND.shape[1]), dtype=np.float32)
    all_ND[list(places.numbers)] = embedded.embeddings_ND
    all_texts: list[str | None] = [None] * places.rows
    for number, text in zip(places.numbers, texts, strict=True):
        all_texts[number] = text
    return Embedded(all_ND, embedded.long_texts), all_texts


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """See that `write_embeddings` can write, before hours are spent on embedding.

    Raises:
        DataError: another suffix, a folder, no right to write. RunError: one of the inputs, or a
            file of others.
    """
    if path.suffix not in OUTPUT_FORMATS:
        raise DataError(
            "unknown format",
            where=str(path),
            expected=" or ".join(OUTPUT_FORMATS) + ", or a folder that ends in /",
            found=path.suffix or "no suffix",
        )
    require_writable(path, "file")
    refuse_output(path, inputs, _holds_embeddings)
    if path.suffix == ".npy":
        refuse_output(rows_file(path), inputs, _holds_embeddings)


def require_writable(path: Path, kind: Literal["file", "folder"]) -> None:
    """Raise DataError if no file, or no folder, can be written there."""
    wrong = path.is_dir() if kind == "file" else path.exists() and not path.is_dir()
    home = next(folder for folder in path.absolute().parents if folder.exists())
    if wrong or not home.is_dir() or not os.access(path if path.is_dir() else home, os.W_OK):
        raise DataError(
            f"no {kind} can be written there", where=str(path), fix="give another --out"
        )


def _holds_embeddings(file: Path) -> bool:
    """Whether a file may be an earlier output."""
    try:
        if file.suffix == ".npy":
            return np.load(file, mmap_mode="r", allow_pickle=False).dtype in (np.float32, np.int64)
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq

            return "embedding" in pq.read_schema(file).names
        with file.open(encoding="utf-8") as lines:
            first = json.loads(lines.readline())
        return isinstance(first, dict) and "embedding" in first
    # pyarrow's for a file that is no parquet is a ValueError
    except (OSError, ValueError, EOFError):
        return False

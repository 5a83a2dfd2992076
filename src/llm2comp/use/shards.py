"""A folder of embeddings: shards of rows in parquet, and the manifest that says what they are.

    DIR/_manifest.json       model and settings; at the end the rows and SHA-256 of each shard
        shard-00000.parquet  rows 0 to shard_rows - 1: row, kept columns, embedding

Readers of parquet pass over names that begin with _ and take the folder as one table.

A shard appears whole, so one that is there is done. It depends on its own rows alone.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from llm2comp.data.streams import Stream, Survey, TextRow, sources_of
from llm2comp.errors import DataError, RunError
from llm2comp.recipe import Section
from llm2comp.system.console import BadRows, Dtype, LongTexts, Precision, Role
from llm2comp.system.files import sha256, to_json, write_bytes, write_text
from llm2comp.system.folders import EMBEDDINGS, claim, refuse_taken
from llm2comp.use.writing import refuse_bad_rows, require_writable

MANIFEST_FILE = "_manifest.json"
# Key of a shard's own metadata: the manifest without names of sources and files.
METADATA = b"llm2comp"
# Texts whose embeddings give the ranges of int8 and uint8.
RANGE_TEXTS = 1000


class EmbedOptions(Section):
    """How rows become embeddings: all that a shard depends on beside rows and model."""

    column: str = "text"
    keep: tuple[str, ...] = ()
    role: Role | None = None
    long_texts: LongTexts = "truncate"
    bad_rows: BadRows = "stop"
    normalise: bool = False
    precision: Precision = "float32"
    num_memory: Annotated[int, Field(ge=1)] | None = None
    max_tokens_per_batch: Annotated[int, Field(ge=1)] | None = None
    dtype: Dtype = "auto"
    backend: Literal["torch", "openvino", "onnx"] = "torch"
    shard_rows: Annotated[int, Field(ge=1)] = 2048


class ShardFile(Section):
    """What a finished folder says of a shard."""

    rows: int
    sha256: str


class Manifest(EmbedOptions):
    """All that the shards of a folder depend on; `files` are written at the end."""

    format_version: Literal[1] = 1
    model: str
    revision: str
    prompt: str
    dimensions: int
    rows: int = Field(description="of all sources, with and without a text")
    texts: int
    digest: str = Field(description="of rows and kept columns, SHA-256")
    ranges: tuple[tuple[float, ...], ...] | None = Field(
        default=None, description="int8 and uint8: lowest and highest of each dimension"
    )
    sources: tuple[str, ...] = ()
    files: dict[str, ShardFile] = {}

    @property
    def shards(self) -> int:
        """How many there are when all is done."""
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> int:
        """How many rows a shard stands for, with and without a text."""
        return min(self.shard_rows, self.rows - shard * self.shard_rows)


def folder_meant(out: str) -> bool:
    """Whether an output is a folder: it ends in /, or is one and has no suffix of a file."""
    return out.endswith(("/", os.sep)) or (Path(out).is_dir() and not Path(out).suffix)


def refuse_folder_options(
    inputs: Sequence[str], options: EmbedOptions, others: Sequence[str] = ()
) -> None:
    """Raise DataError for what only a folder of shards can have; `others` are asked for, too."""
    plain = EmbedOptions()
    asked = [*others, *["several inputs"] * (len(inputs) > 1)]
    for name in ("keep", "precision", "shard_rows"):
        if getattr(options, name) != getattr(plain, name):
            asked.append("--" + name.replace("_", "-"))
    if asked:
        fix = "give a folder: --out DIR/"
        raise DataError(f"{' and '.join(asked)} cannot go into one file", where="--out", fix=fix)


# What may differ where a folder is gone on with.
_FREE = ("sources", "files", "ranges")


@dataclass(frozen=True)
class Job:
    """What is to be embedded, and where to."""

    out: Path
    stream: Stream
    survey: Survey
    options: EmbedOptions

    def known(self) -> dict[str, Any]:
        """All of the manifest that does not need the model."""
        survey = self.survey
        found = {"rows": survey.rows, "texts": survey.texts, "digest": survey.digest}
        return self.options.model_dump() | found | {"sources": self.stream.sources}


def prepare(inputs: Sequence[str | Path], out: Path, options: EmbedOptions) -> Job:
    """Refuse what can be refused before a model is loaded. Reads all rows once.

    Raises:
        DataError: a source that cannot be read; rows without a text, under `stop`.
        RunError: the folder holds something else, or embeddings made otherwise.
    """
    require_writable(out, "folder")
    refuse_taken(out, EMBEDDINGS)
    sources = sources_of(inputs)
    taken = {"row", "embedding"}.intersection(options.keep)
    if taken or len(set(options.keep)) < len(options.keep):
        problem = f"cannot be kept: {', '.join(taken)}" if taken else "a column is kept twice"
        raise DataError(problem, where="--keep", expected="other columns, each once")
    stream = Stream(sources, options.column, options.keep)
    survey = stream.survey(RANGE_TEXTS if options.precision.endswith("int8") else 0)
    if options.bad_rows == "stop":
        where = sources[0] if len(sources) == 1 else f"{len(sources):,} sources"
        refuse_bad_rows(survey.rows, survey.texts, survey.left_out, where)
    job = Job(out, stream, survey, options)
    refuse_other(out, job.known())
    return job


def read_manifest(out: Path) -> Manifest | None:
    """The manifest of a folder, or None. Raises RunError if it is damaged or of another version."""
    file = out / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(file.read_bytes()) if file.exists() else None
    except ValidationError as error:
        fix = "give another --out, or delete the folder"
        cause = f"not a manifest: {error.errors()[0]['msg']}"
        raise RunError(cause, where=str(file), fix=fix) from error


def refuse_other(out: Path, asked: Mapping[str, Any]) -> None:
    """Raise RunError if a folder's embeddings were made otherwise; says what differs."""
    if (manifest := read_manifest(out)) is None:
        if stray := min(out.glob("shard-*.parquet"), default=None):
            problem, fix = "shards without their manifest", "give another --out, or delete them"
            raise RunError(problem, where=str(out), found=stray.name, fix=fix)
        return
    there = manifest.model_dump()
    changed = [key for key in asked if key not in _FREE and asked[key] != there[key]]
    if changed:
        lines = (
            f"{key}: {str(there[key])[:60]!r} there, {str(asked[key])[:60]!r} asked for"
            for key in changed
        )
        raise RunError(
            "the folder holds embeddings made otherwise",
            where=str(out),
            found="; ".join(lines),
            fix="give another --out, or delete the folder",
        )


def claim_folder(out: Path, manifest: Manifest) -> Manifest:
    """Make the folder that of a manifest; returns the one that is there.

    Raises RunError when it is of others, or holds something else.
    """
    refuse_other(out, manifest.model_dump())
    claim(out, EMBEDDINGS)
    for leftover in out.glob(".shard-*.part"):  # of a process that was killed
        leftover.unlink()
    return read_manifest(out) or write_manifest(out, manifest)


def write_manifest(out: Path, manifest: Manifest) -> Manifest:
    """Write it in one step; returns it."""
    write_text(out / MANIFEST_FILE, manifest.model_dump_json(indent=1))
    return manifest


def shard_file(out: Path, shard: int) -> Path:
    """Where a shard stands."""
    return out / f"shard-{shard:05d}.parquet"


def facts_of(file: Path) -> dict[str, Any] | None:
    """What a shard says of itself: manifest, `rows_there`, `long_texts`; None: it is not whole."""
    try:
        found = pq.read_metadata(file)
        return {**json.loads(found.metadata[METADATA]), "rows_there": found.num_rows}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def all_rows(
    manifest: Manifest, shard: int, rows: Sequence[TextRow], embeddings_ND: NDArray[np.float32]
) -> tuple[list[tuple[int, tuple[str | None, ...]]], NDArray[np.float32]]:
    """Row numbers, kept values and embeddings of a shard as they are written.

    Under `zero` a row without a text has zeros and no values; otherwise there is none.
    """
    if manifest.bad_rows != "zero":
        return [(row.number, row.kept) for row in rows], embeddings_ND
    begin = shard * manifest.shard_rows
    numbers = range(begin, min(begin + manifest.shard_rows, manifest.rows))
    kept = dict.fromkeys(numbers, (None,) * len(manifest.keep)) | {r.number: r.kept for r in rows}
    spread_ND = np.zeros((len(numbers), manifest.dimensions), np.float32)
    spread_ND[[row.number - begin for row in rows]] = embeddings_ND
    return list(kept.items()), spread_ND


def write_shard(
    out: Path,
    manifest: Manifest,
    shard: int,
    rows: Sequence[tuple[int, tuple[str | None, ...]]],
    stored: NDArray[Any],
    long_texts: int,
) -> None:
    """Write row numbers, kept columns and embeddings as they are `stored`, in one step.

    Raises RunError: cannot be written.
    """
    columns = [pa.array([number for number, _ in rows], pa.int64())]
    for place in range(len(manifest.keep)):
        columns.append(pa.array([kept[place] for _, kept in rows], pa.string()))
    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1]))
    facts = manifest.model_dump(exclude={"sources", "files"})
    facts |= {"shard": shard, "long_texts": long_texts}
    table = pa.table(columns, names=["row", *manifest.keep, "embedding"])
    buffer = io.BytesIO()
    table = table.replace_schema_metadata({METADATA: to_json(facts)})
    # numbers of embeddings hardly repeat: a dictionary of them would only take memory
    pq.write_table(table, buffer, use_dictionary=list(manifest.keep))
    write_bytes(shard_file(out, shard), buffer.getvalue())


def finish(out: Path, manifest: Manifest) -> int:
    """Name all shards in the manifest; returns how many texts were over the model's limit.

    Raises RunError: a shard that is not whole.
    """
    named, long_texts = {}, 0
    for file in (shard_file(out, shard) for shard in range(manifest.shards)):
        if (facts := facts_of(file)) is None:
            raise RunError("is not whole", where=str(file), fix="run the same command again")
        named[file.name] = ShardFile(rows=facts["rows_there"], sha256=sha256(file))
        long_texts += facts["long_texts"]
    write_manifest(out, manifest.model_copy(update={"files": named}))
    return long_texts

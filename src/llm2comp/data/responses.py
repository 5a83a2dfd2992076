"""A folder of an LM's responses to texts: its manifest, its shards, the rows in it.

responses.json               how they were made: `Manifest`
responses-00000.jsonl, ...   a row {"text", "response"} per text, in the texts' order; an empty
                             response stays in
responses-00000.npy, ...     where a teacher was asked: its embedding of each response, (rows, D_t)
                             float16
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from llm2comp.data.columns import Columns
from llm2comp.data.tables import Row, Rows, file_rows
from llm2comp.errors import DataError
from llm2comp.recipe import Section
from llm2comp.recipe.parts import TEXT
from llm2comp.system.files import sha256

MANIFEST_FILE = "responses.json"
# Column that holds the teacher's embedding of a response: of a shard's .npy, or lists of numbers in
# files of one's own.
TEACHER = "teacher"


class Manifest(Section):
    """Everything the responses depend on. The batch size matters only if they are sampled."""

    format_version: Literal[1] = 1
    model: str
    revision: str | None = None
    weights: str = Field(default="", description="digest of a local model's files")
    texts: Annotated[int, Field(ge=1)] = Field(description="how many")
    texts_digest: str
    prompt: str = TEXT
    chat_template: str | None = Field(
        default=None, description="the tokenizer's template, where it was applied"
    )
    max_tokens: int = Field(
        description="longest prompt, template included; the text of a longer one is cut"
    )
    max_new_tokens: int
    temperature: float = Field(description="0 = greedy")
    seed: int
    teacher: str | None = None
    teacher_revision: str | None = None
    shard_size: Annotated[int, Field(ge=1)]

    @property
    def shards(self) -> int:
        """How many there are when all is done."""
        return -(-self.texts // self.shard_size)

    def place(self, shard: int) -> slice:
        """Which of the texts a shard holds."""
        return slice(shard * self.shard_size, min((shard + 1) * self.shard_size, self.texts))


def shard_file(folder: Path, shard: int) -> Path:
    """File of texts and responses of one shard.

    It is written last, so its presence means a complete shard.
    """
    return folder / f"responses-{shard:05d}.jsonl"


def teacher_file(folder: Path, shard: int) -> Path:
    """The teacher's embeddings of one shard's responses."""
    return folder / f"responses-{shard:05d}.npy"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises DataError when there is none or it is damaged."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise DataError(
            "a folder without responses",
            where=str(folder),
            expected=f"{MANIFEST_FILE} in it, or a file of texts",
        )
    try:
        return Manifest.model_validate_json(file.read_bytes())
    except ValidationError as error:
        what = error.errors()[0]
        found = f"{'.'.join(map(str, what['loc']))}: {what['msg']}"
        raise DataError(
            "is damaged",
            where=str(file),
            found=found,
            fix="make the responses anew in another folder",
        ) from None


def read_shard(
    folder: Path, manifest: Manifest, shard: int, columns: Columns
) -> list[tuple[str, Row | str]]:
    """Rows of one shard with their places; the column `teacher` is (D_t,) float32.

    Raises:
        DataError: it is missing, or damaged: other rows, or other embeddings, than the manifest
            says.
    """
    file, place = shard_file(folder, shard), manifest.place(shard)
    count = place.stop - place.start
    if not file.is_file():
        fix = "run `llm2comp generate-responses` with the same settings again; it goes on"
        raise DataError(
            "a shard is missing", where=str(file), expected=f"{manifest.shards:,} shards", fix=fix
        )
    rows = [(f"{file.name}, {line}", row) for line, row in file_rows(file, columns)]
    damaged = [row for _, row in rows if not isinstance(row, dict)]
    if len(rows) != count or damaged:
        found = ", one ".join([f"{len(rows):,}", *map(str, damaged[:1])])
        raise DataError(
            "is damaged", where=str(file), expected=f"{count:,} rows", found=found, fix=_again(file)
        )
    if TEACHER in columns:
        vectors_ND = _read_teacher(folder, manifest, shard, count)
        rows = [
            (line, {**row, TEACHER: v_D})  # type: ignore[dict-item]
            for (line, row), v_D in zip(rows, vectors_ND, strict=True)
        ]
    return rows


def folder_rows(folder: Path, columns: Columns) -> Rows:
    """Rows of all shards in order.

    Raises DataError as `read_shard`, and where `teacher` is asked for and was not made.
    """
    manifest = read_manifest(folder)
    if TEACHER in columns and manifest.teacher is None:
        fix = "make the responses anew with `llm2comp generate-responses --teacher MODEL`"
        raise DataError("holds no embeddings of a teacher", where=str(folder), fix=fix)
    for shard in range(manifest.shards):
        yield from read_shard(folder, manifest, shard, columns)


def source_digest(source: Path) -> str:
    """Hex digest of a file's content, or of all names and contents in a folder of responses."""
    if source.is_file():
        state = source.stat()
        return _digest_once(source, state.st_size, state.st_mtime_ns)
    files: Iterator[Path] = (path for path in sorted(source.glob("responses*")) if path.is_file())
    return hashlib.sha256(
        "".join(f"{path.name}:{sha256(path)}\n" for path in files).encode()
    ).hexdigest()


@functools.lru_cache(maxsize=256)
def _digest_once(file: Path, size: int, modified_ns: int) -> str:
    """Digest of a file, remembered until it changes: a study asks for it many times."""
    return sha256(file)


def _read_teacher(folder: Path, manifest: Manifest, shard: int, count: int) -> NDArray[np.float32]:
    file = teacher_file(folder, shard)
    try:
        vectors_ND = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"is damaged: {error}", where=str(file), fix=_again(shard_file(folder, shard))
        ) from None
    if vectors_ND.ndim != 2 or len(vectors_ND) != count:
        fix = _again(shard_file(folder, shard))
        raise DataError(
            "is damaged",
            where=str(file),
            expected=f"{count:,} rows",
            found=vectors_ND.shape,
            fix=fix,
        )
    return np.asarray(vectors_ND, dtype=np.float32)


def _again(file: Path) -> str:
    return f"delete {file.name} and run `llm2comp generate-responses` with the same settings again"

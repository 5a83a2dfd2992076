"""Corpora on disk: a source is read and tokenised once, cached, and then read row by row.

CACHE/tokens-<key>/tokens.i32   token ids of all rows, one after the other (little-endian int32)
                   bounds.i64   where each row begins, and where the last one ends
CACHE/texts-<key>/texts.arrow   texts as an Arrow stream of one column, `anchor`
CACHE/<kind>-<key>/stored.json  written last: `Stored`

The key is a hash of all that the rows depend on: content of the sources and which of their rows are
read, tokenizer, limits. CACHE is $LLM2COMP_CACHE, else $XDG_CACHE_HOME/llm2comp, else
~/.cache/llm2comp. Memory does not grow with the corpus, but for some ten bytes per row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import ValidationError

from llm2comp.data.pretext import long_enough, token_rows
from llm2comp.data.sources import iterate_sources, source_key
from llm2comp.errors import DataError
from llm2comp.recipe import PretextStage, Section, TextData
from llm2comp.system.cache import cache_folder, cached, flush
from llm2comp.system.files import to_json, write_text
from llm2comp.system.folders import new_folder

MANIFEST_FILE, TOKENS_FILE, BOUNDS_FILE, TEXTS_FILE = (
    "stored.json",
    "tokens.i32",
    "bounds.i64",
    "texts.arrow",
)
# To be raised when the code makes other rows of the same source and settings.
ROWS_VERSION = 2
# A file is known by its size and this many parts, evenly spread; a smaller one by all of it.
PARTS, PART_BYTES = 64, 2**16


class Stored(Section):
    """Manifest of a cache entry: its files, and the messages from when it was made."""

    format_version: Literal[1] = 1
    files: dict[str, tuple[int, str]]  # name → bytes, digest of parts
    lines: tuple[str, ...]  # one per source: what was read, what was left out
    left_out: dict[str, int] = {}  # texts that are unfit for the stage, by reason


class TokenStore(Sequence[NDArray[np.int32]]):
    """Rows of token ids in a folder; each is read from the disk when it is asked for.

    Not memory-mapped: pages that were touched would count as memory of the process, and a disk's
    error would end it without a word. A folder that is deleted can be read until the process ends.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bounds = np.fromfile(folder / BOUNDS_FILE, dtype="<i8")
        self._file = (folder / TOKENS_FILE).open("rb", buffering=0)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        """A worker process that is not forked opens the files by itself."""
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> NDArray[np.int32]:  # type: ignore[override]
        i = range(len(self))[index]
        begin, end = (4 * int(bound) for bound in self.bounds[i : i + 2])
        content = os.pread(self._file.fileno(), end - begin, begin)
        if len(content) != end - begin:
            fix = "delete the folder and run again"
            raise DataError(
                "is damaged", where=str(self.folder), expected=f"row {i} in {TOKENS_FILE}", fix=fix
            )
        return np.frombuffer(content, dtype="<i4")

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, without reading them."""
        return np.diff(self.bounds)


def write_rows(folder: Path, rows: Iterable[NDArray[np.int32]]) -> TokenStore:
    """Write rows one by one into an empty folder."""
    end = 0
    with (folder / TOKENS_FILE).open("wb") as tokens, (folder / BOUNDS_FILE).open("wb") as bounds:
        bounds.write(end.to_bytes(8, "little"))
        for row in rows:
            tokens.write(row.astype("<i4", copy=False).tobytes())
            end += len(row)
            bounds.write(end.to_bytes(8, "little"))
    return TokenStore(folder)


def stored_rows(
    stage: PretextStage,
    tokenise: Callable[[Sequence[str]], list[list[int]]],
    max_tokens: int,
    bos_id: int | None,
    tokenizer: Any,
    tell: Callable[[str], None],
    root: Path | None = None,
) -> tuple[TokenStore, Counter[str]]:
    """Stage 1's texts as token ids, and those left out by reason: `token_rows` of all its sources,
    from the cache if there.

    `tokenizer` is what `tokenise` works with; `tell` is given a line per source, the same whether
    it was read now or before; `root` is the cache's folder, the user's unless given. The rest as
    for `token_rows`.

    Raises:
        DataError: a source cannot be read, or no text is left. RunError: the cache cannot be
            written.
    """

    def build(folder: Path, tell: Callable[[str], None]) -> Counter[str]:
        texts = iterate_sources(stage.data, tell)
        return token_rows(
            texts, stage, tokenise, max_tokens, bos_id, lambda rows: write_rows(folder, rows)
        )[1]

    limits = stage.model_dump(include={"min_characters", "long_texts", "site_margin_tokens"})
    key = [limits, max_tokens, bos_id, tokenizer_digest(tokenizer), version("tokenizers")]
    folder, left_out = _stored("tokens", stage.data, key, build, tell, root)
    return TokenStore(folder), left_out


def stored_texts(
    specs: Sequence[TextData],
    min_characters: int,
    tell: Callable[[str], None],
    root: Path | None = None,
) -> Any:
    """Stage 2's texts as a memory-mapped datasets.Dataset, from the cache if there.

    Each text is both `anchor` and `positive`.

    Arguments and errors as for `stored_rows`.
    """
    import datasets

    def build(folder: Path, tell: Callable[[str], None]) -> Counter[str]:
        schema = pa.schema({"anchor": pa.large_string()})
        with (folder / TEXTS_FILE).open("wb") as out, pa.ipc.new_stream(out, schema) as table:
            for texts in long_enough(iterate_sources(specs, tell), len, min_characters, Counter()):
                table.write_batch(
                    pa.record_batch([pa.array(texts, pa.large_string())], schema=schema)
                )
        return Counter()

    folder, _ = _stored("texts", specs, [min_characters], build, tell, root)
    anchors = datasets.Dataset.from_file(str(folder / TEXTS_FILE))
    return datasets.concatenate_datasets(
        [anchors, anchors.rename_column("anchor", "positive")], axis=1
    )


def distinct(texts: Any, most: int) -> int:
    """How many different texts there are in `stored_texts`, counted up to `most`."""
    seen: set[str] = set()
    for chunk in texts.data.column("anchor").chunks:
        seen.update(chunk.to_pylist())
        if len(seen) >= most:
            break
    return min(len(seen), most)


def tokenizer_digest(tokenizer: Any) -> str:
    """Hex digest of how a fast tokenizer treats a text.

    Its origin and its present padding and truncation are left out.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    state["split_special_tokens"] = tokenizer.split_special_tokens
    return hashlib.sha256(to_json(state, sort_keys=True).encode()).hexdigest()


def _stored(
    kind: str,
    specs: Sequence[TextData],
    key: list[Any],
    build: Callable[[Path, Callable[[str], None]], Counter[str]],
    tell: Callable[[str], None],
    root: Path | None,
) -> tuple[Path, Counter[str]]:
    """The folder that `build` fills, and its counts: built now unless it is whole already."""
    everything = [ROWS_VERSION, [source_key(spec) for spec in specs], *key]
    name = f"{kind}-{hashlib.sha256(to_json(everything, sort_keys=True).encode()).hexdigest()[:32]}"
    folder = (root or cache_folder()) / name
    stored = cached(folder, lambda: _read(folder), lambda: _build(folder, build))
    for line in stored.lines:
        tell(line)
    return folder, Counter(stored.left_out)


def _build(folder: Path, build: Callable[[Path, Callable[[str], None]], Counter[str]]) -> Stored:
    lines: list[str] = []
    with new_folder(folder, None) as new:
        left_out = build(new, lines.append)
        stored = Stored(
            files={file.name: _seal(file) for file in new.iterdir()},
            lines=tuple(lines),
            left_out=left_out,
        )
        write_text(new / MANIFEST_FILE, stored.model_dump_json(indent=1))
    return stored


def _read(folder: Path) -> Stored | None:
    """The manifest of a folder if all its files are complete, else None."""
    try:
        stored = Stored.model_validate_json((folder / MANIFEST_FILE).read_bytes())
        return (
            stored
            if all(_known(folder / name) == known for name, known in stored.files.items())
            else None
        )
    except (OSError, ValidationError):
        return None


def _seal(file: Path) -> tuple[int, str]:
    """Bring a file to the disk; its size and digest."""
    flush(file)
    return _known(file)


def _known(file: Path) -> tuple[int, str]:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        for begin in range(0, size, max(PART_BYTES, size // PARTS)):
            stream.seek(begin)
            digest.update(stream.read(PART_BYTES))
    return size, digest.hexdigest()

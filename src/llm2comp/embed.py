"""Texts → embeddings in bulk: long-text policies, batches with progress, files written in one step."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from llm2comp.console import Bar
from llm2comp.errors import DataError
from llm2comp.files import write_bytes

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

LongTexts = Literal["truncate", "chunk-mean", "error"]
OUTPUT_FORMATS = (".npy", ".parquet", ".jsonl")


@dataclass(frozen=True)
class Embedded:
    """`embeddings_ND` float32, and how many texts were longer than the model reads."""

    embeddings_ND: NDArray[np.float32]
    long_texts: int


def embed(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    role: Literal["query", "document"] | None = None,
    long_texts: LongTexts = "truncate",
    batch_size: int = 32,
    normalise: bool = False,
) -> Embedded:
    """Embed texts in order.

    Args:
        model: any sentence-transformers model.
        texts: the texts.
        role: use the model's stored prompt for queries or documents.
        long_texts: what to do with texts over the model's limit: cut them, embed their parts and average
            (each part weighs by its tokens), or stop.
        batch_size: texts encoded at once.
        normalise: scale each embedding to length 1.

    Raises:
        DataError: no texts; a text over the limit under `error`; an embedding that is not finite.
    """
    if not texts:
        raise DataError("nothing to embed", expected="one or more texts", found="none")
    prompt: str = (model.prompts.get(role) or "") if role else ""
    pieces = [_pieces(model, text, prompt) if _may_be_long(model, prompt + text) else [text] for text in texts]
    long = [i for i, parts in enumerate(pieces) if len(parts) > 1]
    if long and long_texts == "error":
        raise DataError(
            f"{len(long):,} texts are longer than the model reads",
            where=f"text {long[0] + 1}",
            expected=f"{model.max_seq_length} tokens or fewer, prompt and memory tokens included",
            found=f"about {len(pieces[long[0]])} times that",
            fix="choose truncate or chunk-mean for long texts",
        )
    if long_texts != "chunk-mean":
        pieces = [[text] for text in texts]
    flat = [prompt + part for parts in pieces for part in parts]
    states = _encode(model, flat, batch_size)
    lengths = (
        np.array([len(model.tokenizer(part, verbose=False)["input_ids"]) for part in flat]) if long else np.ones(len(flat))
    )
    bounds = np.cumsum([0, *(len(parts) for parts in pieces)])
    means = [np.average(states[a:b], axis=0, weights=lengths[a:b]) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    embeddings = np.asarray(means, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(embeddings).all(1))
    if len(bad):
        raise DataError("an embedding is not finite", where=f"text {bad[0] + 1}", found=texts[bad[0]][:80])
    if normalise:
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return Embedded(embeddings, len(long))


def write_embeddings(path: Path, embedded: Embedded, texts: Sequence[str]) -> None:
    """Write .npy (the matrix), .parquet or .jsonl (columns text, embedding), in one step.

    Raises:
        DataError: another suffix. RunError: cannot be written.
    """
    check_output(path)
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, embedded.embeddings_ND)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        width = embedded.embeddings_ND.shape[1]
        column = pa.FixedSizeListArray.from_arrays(pa.array(embedded.embeddings_ND.ravel()), width)
        pq.write_table(pa.table({"text": list(texts), "embedding": column}), buffer)
    else:
        rows = zip(texts, embedded.embeddings_ND.tolist(), strict=True)
        lines = (json.dumps({"text": text, "embedding": values}, ensure_ascii=False) + "\n" for text, values in rows)
        buffer.write("".join(lines).encode())
    write_bytes(path, buffer.getvalue())


def check_output(path: Path) -> None:
    """Raise DataError for a file name that `write_embeddings` cannot write."""
    if path.suffix not in OUTPUT_FORMATS:
        raise DataError(
            "unknown format", where=str(path), expected=" or ".join(OUTPUT_FORMATS), found=path.suffix or "no suffix"
        )


def _encode(model: SentenceTransformer, texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
    """Longest first, so that a batch holds texts of like length; back in order."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    out: NDArray[np.float32] | None = None
    with Bar("embed", len(texts)) as bar:
        for start in range(0, len(texts), batch_size):
            places = order[start : start + batch_size]
            batch: Any = model.encode([texts[i] for i in places], batch_size=batch_size, prompt="", show_progress_bar=False)
            if out is None:
                out = np.empty((len(texts), batch.shape[1]), dtype=np.float32)
            out[places] = batch
            bar.advance(len(places))
    assert out is not None
    return out


def _room(model: SentenceTransformer) -> int:
    """Text tokens that fit into one input; special tokens of the template not counted."""
    limit = model.max_seq_length or 10**9
    return int(limit) - len(model.tokenizer("", verbose=False)["input_ids"])


def _may_be_long(model: SentenceTransformer, text: str) -> bool:
    return len(text.encode()) > _room(model)  # a token holds at least a byte


def _pieces(model: SentenceTransformer, text: str, prompt: str) -> list[str]:
    """A text as parts that each fit behind the prompt; one part if it fits whole."""
    encode = {"add_special_tokens": False, "verbose": False}
    room = _room(model) - len(model.tokenizer(prompt, **encode)["input_ids"])
    offsets = model.tokenizer(text, return_offsets_mapping=True, **encode)["offset_mapping"]
    if room < 1 or len(offsets) <= room:
        return [text]
    return [text[offsets[i][0] : offsets[min(i + room, len(offsets)) - 1][1]] for i in range(0, len(offsets), room)]

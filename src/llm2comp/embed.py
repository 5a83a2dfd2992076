"""Texts → embeddings in bulk: long-text policies, batches with progress, files written in one step."""

from __future__ import annotations

import io
import json
import os
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
TOKENISE_AT_ONCE = 1000


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
        DataError: no texts, or one that is not Unicode; a text over the limit under `error`; a prompt that leaves no room;
            an embedding that is not finite.
    """
    from llm2comp.encoder import refuse_not_finite

    _check_texts(texts)
    prompt: str = (model.prompts.get(role) or "") if role else ""
    room = _room(model, prompt)
    tokens = _count_tokens(model, [prompt + text for text in texts])
    long = [i for i, count in enumerate(tokens) if count > room]
    if long and long_texts == "error":
        raise DataError(
            f"{len(long):,} texts are longer than the model reads",
            where=f"text {long[0] + 1}",
            expected=f"{room:,} tokens or fewer" + (", prompt included" if prompt else ""),
            found=f"{tokens[long[0]]:,} tokens",
            fix="choose truncate or chunk-mean for long texts",
        )
    pieces = [[text] for text in texts]
    if long_texts == "chunk-mean":
        for i in long:
            pieces[i] = _pieces(model, texts[i], prompt, room)
    flat = [part for parts in pieces for part in parts]
    states = _encode(model, [prompt + part for part in flat], batch_size)
    weights = _count_tokens(model, flat) if len(flat) > len(texts) else [1] * len(flat)
    bounds = np.cumsum([0, *(len(parts) for parts in pieces)])
    means = [
        states[a] if b == a + 1 else np.average(states[a:b], axis=0, weights=weights[a:b])
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    embeddings = np.asarray(means, dtype=np.float32)
    refuse_not_finite(embeddings, texts)
    if normalise:
        embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
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
    """Raise DataError for a file name that `write_embeddings` cannot write, before hours are spent on embedding."""
    if path.suffix not in OUTPUT_FORMATS:
        raise DataError(
            "unknown format", where=str(path), expected=" or ".join(OUTPUT_FORMATS), found=path.suffix or "no suffix"
        )
    home = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not home.is_dir() or not os.access(home, os.W_OK):
        raise DataError("no file can be written there", where=str(path), fix="give another --out")


def _check_texts(texts: Sequence[str]) -> None:
    if not texts:
        raise DataError("nothing to embed", expected="one or more texts", found="none")
    for number, text in enumerate(texts, 1):
        try:
            text.encode("utf-8")
        except (UnicodeEncodeError, AttributeError):  # a byte that did not decode, as in arguments; no string at all
            raise DataError("not a Unicode text", where=f"text {number}", found=ascii(text)[:80]) from None


def _encode(model: SentenceTransformer, texts: Sequence[str], batch_size: int) -> NDArray[np.float32]:
    """Longest first, so that a batch holds texts of like length; back in order."""
    from llm2comp.tokens import longest_first

    out: NDArray[np.float32] | None = None
    with Bar("embed", len(texts)) as bar:
        for places in longest_first([len(text) for text in texts], lambda _: batch_size):
            batch: Any = model.encode([texts[i] for i in places], batch_size=batch_size, prompt="", show_progress_bar=False)
            if out is None:
                out = np.empty((len(texts), batch.shape[1]), dtype=np.float32)
            out[places] = batch
            bar.advance(len(places))
    assert out is not None
    return out


def _room(model: SentenceTransformer, prompt: str) -> int:
    """Tokens of prompt and text that fit into one input, beside what the model itself adds (BOS, memory)."""
    from llm2comp.encoder import MemoryEncoder

    module: Any = model[0]
    if isinstance(module, MemoryEncoder):  # live: its tokenizer has no template
        room = module.max_tokens - (module.compressor.backbone.bos_id is not None)
    else:
        room = (model.max_seq_length or 10**9) - len(model.tokenizer("", verbose=False)["input_ids"])
    if prompt and _count_tokens(model, [prompt])[0] >= room:
        raise DataError("the prompt leaves no room for a text", expected=f"fewer than {room} tokens", found=repr(prompt[:80]))
    return room


def _count_tokens(model: SentenceTransformer, texts: Sequence[str]) -> list[int]:
    """Tokens of each text; what the model adds (BOS, memory) not counted."""
    counts: list[int] = []
    for start in range(0, len(texts), TOKENISE_AT_ONCE):
        batch = list(texts[start : start + TOKENISE_AT_ONCE])
        counts += [len(row) for row in model.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]]
    return counts


def _pieces(model: SentenceTransformer, text: str, prompt: str, room: int) -> list[str]:
    """A text in parts that each fit behind the prompt, cut between tokens."""
    spans = model.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)["offset_mapping"]
    free = room - (_count_tokens(model, [prompt])[0] if prompt else 0)
    parts, begin = [], 0
    while begin < len(spans):
        end = min(begin + free, len(spans))
        # a part may have more tokens than the text had there: its last character whole, its first word without a space
        while end > begin + 1 and _count_tokens(model, [prompt + text[spans[begin][0] : spans[end - 1][1]]])[0] > room:
            end -= 1
        parts.append(text[spans[begin][0] : spans[end - 1][1]])
        begin = end
    return parts

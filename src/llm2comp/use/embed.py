"""Texts → embeddings in bulk: long texts, batches with progress.

All texts are tokenised before the first is encoded, each once (inputs.py); vectors.py batches them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llm2comp.errors import DataError
from llm2comp.model.encoder import NO_LIMIT, refuse_not_finite
from llm2comp.model.inputs import Frame, Inputs, frame_of, prompt_of, tokenise
from llm2comp.model.vectors import Budget, embeddings_of, unit_length
from llm2comp.system.console import Bar, LongTexts, Role
from llm2comp.system.files import is_unicode
from llm2comp.use.writing import Embedded

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def embed(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    role: Role | None = None,
    long_texts: LongTexts = "truncate",
    max_tokens_per_batch: int | None = None,
    normalise: bool = False,
    bar: Bar | None = None,
) -> Embedded:
    """Embed texts in order.

    Args:
        model: any sentence-transformers model.
        texts: the texts.
        role: use the model's stored prompt for queries or documents, and its limit for them.
        long_texts: what to do with texts over the model's limit: cut them, embed their parts and
            average (each part weighs by its tokens), or stop.
        max_tokens_per_batch: texts are encoded so many tokens at once, padding and memory included;
            one text at least. None = by the device.
        normalise: scale each embedding to length 1.
        bar: is told of each part of a text that is done, in place of a bar of its own.

    Raises:
        DataError: no texts, or one that is not Unicode; a text over the limit under `error`; a
            prompt that leaves no room; an embedding that is not finite.
    """
    _check_texts(texts)
    prompt, frame = prompt_of(model, role), frame_of(model, role)
    room = room_of(model, frame, prompt)
    # A text is one part or, under chunk-mean, several: what the model is given, its tokens, its
    # weight in the mean.
    parts = [[prompt + text] for text in texts]
    ids = [[row] for row in tokenise(model, [prompt + text for text in texts])]
    weights = [[1] for _ in texts]
    long = [i for i, (row,) in enumerate(ids) if len(row) > room]
    if long and long_texts == "error":
        raise _too_long(long, len(ids[long[0]][0]), room, prompt)
    if long_texts == "chunk-mean":
        for i in long:
            pieces = _pieces(model, texts[i], prompt, room)
            parts[i] = [prompt + piece for piece in pieces]
            ids[i] = tokenise(model, parts[i])
            weights[i] = [len(row) for row in (tokenise(model, pieces) if prompt else ids[i])]
    flat = [part for group in parts for part in group]
    inputs = Inputs(model, flat, frame, [row for rows in ids for row in rows], prompt="")
    with Bar("embed", len(flat), shown=bar is None) as own:
        budget = Budget.of(model.device, max_tokens_per_batch)
        states = embeddings_of(inputs, budget, bar or own).numpy()
    bounds = np.cumsum([0, *(len(group) for group in parts)])
    means = [
        states[a] if b == a + 1 else np.average(states[a:b], axis=0, weights=weights[i])
        for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
    ]
    embeddings = np.asarray(means, dtype=np.float32)
    refuse_not_finite(embeddings, texts)
    return Embedded(unit_length(embeddings) if normalise else embeddings, len(long))


def _too_long(long: Sequence[int], tokens: int, room: int, prompt: str) -> DataError:
    return DataError(
        f"{len(long):,} texts are longer than the model reads",
        where=f"text {long[0] + 1}",
        expected=f"{room:,} tokens or fewer" + (", prompt included" if prompt else ""),
        found=f"{tokens:,} tokens",
        fix="choose truncate or chunk-mean for long texts",
    )


def _check_texts(texts: Sequence[str]) -> None:
    if not texts:
        raise DataError("nothing to embed", expected="one or more texts", found="none")
    for number, text in enumerate(texts, 1):
        if not (isinstance(text, str) and is_unicode(text)):
            raise DataError("not a Unicode text", where=f"text {number}", found=ascii(text)[:80])


def room_of(model: SentenceTransformer, frame: Frame | None, prompt: str) -> int:
    """Tokens of prompt and text that fit into one input, beside the model's own (BOS, memory)."""
    limit = model.max_seq_length or NO_LIMIT
    around = len(model.tokenizer("", verbose=False)["input_ids"])
    room = frame.room if frame else limit - around
    if room < 1:
        raise DataError(
            "leaves no room for a text",
            where="max_seq_length",
            expected=f"{around + 1} or more",
            found=limit,
        )
    if prompt and len(tokenise(model, [prompt])[0]) >= room:
        raise DataError(
            "the prompt leaves no room for a text",
            expected=f"fewer than {room} tokens",
            found=repr(prompt[:80]),
        )
    return room


def _pieces(model: SentenceTransformer, text: str, prompt: str, room: int) -> list[str]:
    """A text in parts that each fit after the prompt, cut between tokens."""
    spans = model.tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=False, verbose=False
    )["offset_mapping"]
    free = room - (len(tokenise(model, [prompt])[0]) if prompt else 0)
    parts, begin = [], 0
    while begin < len(spans):
        end = min(begin + free, len(spans))
        # a part may have more tokens than the text had there: its last character whole, its first
        # word without a space
        while (
            end > begin + 1
            and len(tokenise(model, [prompt + text[spans[begin][0] : spans[end - 1][1]]])[0]) > room
        ):
            end -= 1
        parts.append(text[spans[begin][0] : spans[end - 1][1]])
        begin = end
    return parts

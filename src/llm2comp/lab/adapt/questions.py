"""Questions that the LM itself writes about the passages, kept where they find their passage.

As in InPars (arXiv 2202.05144) and Promptagator (arXiv 2209.11755): a few examples show a causal
LM what is wanted, and a question that does not find its passage again is dropped.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from typing import Any

from sentence_transformers import SentenceTransformer

from llm2comp.data.weak_pairs import MOST_WORDS, WeakPair, normal
from llm2comp.lab.evaluation.retrieval import Collection
from llm2comp.model.backbone import load_backbone
from llm2comp.model.vectors import embed_texts
from llm2comp.recipe import ModelSettings
from llm2comp.recipe.parts import TEXT
from llm2comp.system.console import Bar, say
from llm2comp.training.responder import Responder, ResponseOptions

WRITTEN = "written"
# A question is kept if words or meaning put its passage among so many first of all asked about.
FOUND = 3
LEAST_WORDS, QUESTION_TOKENS, PROMPT_TOKENS, AT_ONCE = 3, 24, 512, 16
_EXAMPLES = (
    (
        "The ferry leaves the north pier at six each morning, except on Sundays. In winter it "
        "waits for the mail van.",
        "when does the ferry leave in the morning",
    ),
    (
        "Returns the number of bytes that are free on the disk. Raises OSError if the path does "
        "not exist.",
        "how to find out how much disk space is free",
    ),
    (
        "Patients with a fever of more than three days should be seen again, as the first blood "
        "test may have been taken too early.",
        "when should a patient with fever come back",
    ),
)
PROMPT = "".join(f"Text: {text}\nQuestion: {asks}\n\n" for text, asks in _EXAMPLES)
PROMPT += f"Text: {TEXT}\nQuestion:"


def written(
    passages: Sequence[str],
    lm: ModelSettings,
    encoder: SentenceTransformer | None,
    seconds: float,
    seed: int,
) -> list[WeakPair]:
    """Questions about as many passages as fit the time, those alone that find their passage.

    Args:
        passages: to be asked about, in any order.
        lm: what writes, without adapters.
        encoder: helps BM25 to say whether a question finds its passage.
        seconds: for writing; a batch that was begun is finished.
        seed: which passages come first.
    """
    begin, asked = time.monotonic(), dict[str, str]()
    options = ResponseOptions(
        max_new_tokens=QUESTION_TOKENS,
        max_tokens=PROMPT_TOKENS,
        prompt=PROMPT,
        chat_template=False,  # examples to go on from, not a talk
    )
    responder = Responder(load_backbone(lm), options)
    drawn = random.Random(seed).sample(list(passages), len(passages))
    with Bar("write questions", len(drawn)) as bar:
        for first in range(0, len(drawn), AT_ONCE):
            some = drawn[first : first + AT_ONCE]
            said, _ = responder.respond([responder.prompt(passage)[0] for passage in some])
            asked |= {
                text: q for text, words in zip(some, said, strict=True) if (q := _read(words))
            }
            bar.advance(len(some), f"{len(asked)} of {first + len(some)} passages have one")
            if time.monotonic() - begin > seconds:
                break
    kept = _found(asked, encoder)
    shown = f", such as: {kept[0].query}" if kept else ""
    say(f"{len(kept):,} of {len(asked):,} written questions find their passage{shown}")
    return kept


def _read(said: str) -> str | None:
    """The question that was said first; None where there is none."""
    asks = " ".join(said.strip().split("\n")[0].split())
    words = len(re.findall(r"\w+", asks))
    copied = normal(asks).rstrip("?") in {example for _, example in _EXAMPLES}
    return asks if LEAST_WORDS <= words <= MOST_WORDS and not copied else None


def _found(asked: dict[str, str], encoder: SentenceTransformer | None) -> list[WeakPair]:
    """The questions that have their passage among the first, and ask for no other as well."""
    once = {normal(question): text for text, question in asked.items()}
    passages = {str(place): text for place, text in enumerate(once.values())}
    if not passages:
        return []
    queries = {name: asked[text] for name, text in passages.items()}
    search = Collection(queries, passages, {name: {name} for name in passages})
    rankings = [search.by_bm25(FOUND)]
    if encoder is not None:
        vectors: Any = embed_texts(encoder, list(passages.values()), role="document")
        rankings.append(search.by_cosine(encoder, vectors))
    return [
        WeakPair(WRITTEN, queries[name], passages[name])
        for name, *rows in zip(passages, *rankings, strict=True)
        if any(name == found for row in rows for found, _ in row[:FOUND])
    ]

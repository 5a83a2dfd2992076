"""`llm2comp generate-responses`: what an LM says to each of many texts (LLM2Vec-Gen).

And a teacher's embedding of it.

Shards appear whole or not at all, each depends on its own texts alone, and what is there is not
made again: a run that was stopped goes on, and several machines can share one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from llm2comp.data.responses import (
    MANIFEST_FILE,
    Manifest,
    read_manifest,
    read_shard,
    shard_file,
    teacher_file,
)
from llm2comp.errors import RunError
from llm2comp.model.backbone import load_backbone, weights_digest
from llm2comp.model.encoder import refuse_not_finite
from llm2comp.model.tokens import longest_first
from llm2comp.model.vectors import embed_texts
from llm2comp.recipe import ModelSettings
from llm2comp.storage.identity import identity
from llm2comp.storage.loading import load
from llm2comp.system.console import Bar, say
from llm2comp.system.files import to_json, write_bytes, write_text
from llm2comp.system.folders import RESPONSES, claim, refuse_taken
from llm2comp.training.responder import Responder, ResponseOptions

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHARD_SIZE = 200  # what a stop may lose: minutes of a CPU


def generate_responses(
    model: str,
    texts: Sequence[str],
    out: Path,
    options: ResponseOptions | None = None,
    share: tuple[int, int] = (1, 1),
) -> str:
    """Make the shards of a share that are not there yet.

    Args:
        model: a causal LM: Hub id, local folder, GGUF file, `builtin:smollm2` or `builtin:tiny`.
        texts: all texts, also where only a share of them is worked on.
        out: folder of the responses.
        options: how to respond.
        share: (i, n): the i-th of n equal shares, shards i, i + n, ...

    Returns:
        One line: what is there, how many responses are empty.

    Raises:
        RunError: the folder holds responses made otherwise, or something else. DataError: a damaged
            shard; see `Responder`.
    """
    options = options or ResponseOptions()
    refuse_taken(out, RESPONSES)
    settings = ModelSettings(
        name=model, revision=options.revision, attention="causal", device=options.device or "auto"
    )
    responder = Responder(load_backbone(settings), options)
    teacher = None if options.teacher is None else load(options.teacher, options.device)
    begun = read_manifest(out).shard_size if (out / MANIFEST_FILE).is_file() else SHARD_SIZE
    manifest = _manifest(settings, responder, texts, teacher, options.shard_size or begun)
    _claim(out, manifest)
    mine = range(share[0] - 1, manifest.shards, share[1])
    missing = [shard for shard in mine if not shard_file(out, shard).exists()]
    sizes = {shard: len(texts[manifest.place(shard)]) for shard in mine}
    if options.chat_template is None:
        say(
            f"{model}: through its chat template"
            if responder.template
            else f"{model}: no chat template, texts go as they are"
        )
    cut = 0
    with Bar(
        "generate", sum(sizes.values()), sum(sizes[shard] for shard in mine if shard not in missing)
    ) as bar:
        for shard in missing:
            cut += _make_shard(responder, teacher, texts[manifest.place(shard)], out, shard, bar)
    empty = sum(
        not str(row["response"]).strip()
        for shard in mine
        for _, row in read_shard(out, manifest, shard, ("text", "response"))
        if isinstance(row, dict)
    )
    done = sum(shard_file(out, shard).exists() for shard in range(manifest.shards))
    notes = f"{empty:,} empty" + f", {cut:,} texts cut to fit the prompt" * bool(cut)
    return (
        f"{out}: {sum(sizes.values()):,} responses, {notes}; {done:,} of {manifest.shards:,} "
        "shards are there"
    )


def _make_shard(
    responder: Responder,
    teacher: SentenceTransformer | None,
    texts: Sequence[str],
    out: Path,
    shard: int,
    bar: Bar,
) -> int:
    """Respond to the texts of one shard, embed, write. Returns how many texts were cut."""
    prompts = [responder.prompt(text) for text in texts]
    responses = [""] * len(texts)
    begin, tokens, answered = time.monotonic(), 0, 0
    with _own_randomness(responder.options.seed, shard):
        for places in longest_first(
            [len(ids) for ids, _ in prompts], lambda _: responder.options.batch_size
        ):
            found, count = responder.respond([prompts[i][0] for i in places])
            for i, response in zip(places, found, strict=True):
                responses[i] = response
            tokens, answered = tokens + count, answered + len(places)
            spent = max(time.monotonic() - begin, 1e-9)
            bar.advance(
                len(places), f"{answered / spent:,.1f} texts/s, {tokens / spent:,.0f} tokens/s"
            )
    if teacher is not None:
        vectors_ND = embed_texts(teacher, responses).numpy()
        with np.errstate(over="ignore"):
            halves_ND = vectors_ND.astype(np.float16)
        refuse_not_finite(
            halves_ND.astype(np.float32), responses, f"{responder.options.teacher}, shard {shard}"
        )
        buffer = io.BytesIO()
        np.save(buffer, halves_ND)
        write_bytes(teacher_file(out, shard), buffer.getvalue())
    rows = (
        to_json({"text": t, "response": r}, ensure_ascii=False)
        for t, r in zip(texts, responses, strict=True)
    )
    write_text(shard_file(out, shard), "".join(row + "\n" for row in rows))
    return sum(was_cut for _, was_cut in prompts)


@contextlib.contextmanager
def _own_randomness(seed: int, shard: int) -> Iterator[None]:
    """Random numbers fixed by (seed, shard), whatever was made before; the others go on after."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(random.Random(f"{seed}:{shard}").getrandbits(63))
        yield


def _manifest(
    settings: ModelSettings,
    responder: Responder,
    texts: Sequence[str],
    teacher: SentenceTransformer | None,
    shard_size: int,
) -> Manifest:
    options = responder.options
    digest = hashlib.sha256("".join(to_json(text) + "\n" for text in texts).encode())
    return Manifest(
        model=settings.name,
        revision=settings.revision,
        weights=weights_digest(settings),
        texts=len(texts),
        texts_digest=digest.hexdigest(),
        prompt=options.prompt,
        chat_template=responder.template,
        max_tokens=responder.max_tokens,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        teacher=options.teacher,
        teacher_revision=identity(options.teacher, teacher).revision
        if options.teacher and teacher
        else None,
        shard_size=shard_size,
    )


def _claim(out: Path, manifest: Manifest) -> None:
    """Make the folder that of these settings.

    Raises RunError when it is of others, or holds something else.
    """
    if not (out / MANIFEST_FILE).is_file():
        claim(out, RESPONSES)
        write_text(out / MANIFEST_FILE, manifest.model_dump_json(indent=1))
        return
    there, asked = read_manifest(out).model_dump(), manifest.model_dump()
    changed = [key for key in asked if asked[key] != there[key]]
    if changed:
        lines = [
            f"{key}: {str(there[key])[:60]!r} there, {str(asked[key])[:60]!r} asked for"
            for key in changed[:5]
        ]
        raise RunError(
            "the folder holds responses made otherwise",
            where=str(out),
            found="; ".join(lines),
            fix="give another --out, or delete the folder",
        )

"""One shard of a folder: read its rows, embed, store. Used by this process, workers and Ray."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from llm2comp.data.streams import Stream, TextRow
from llm2comp.errors import DataError, RunError
from llm2comp.storage.loading import load
from llm2comp.system.console import Bar
from llm2comp.use.embed import embed
from llm2comp.use.shards import (
    EmbedOptions,
    Manifest,
    all_rows,
    facts_of,
    read_manifest,
    shard_file,
    write_shard,
)
from llm2comp.use.writing import Embedded


@dataclass(frozen=True)
class Bench:
    """What a process needs to make shards of a folder whose manifest stands."""

    out: Path
    stream: Stream
    model: str
    device: str | None

    def everywhere(self) -> Bench:
        """The same for a process with another working directory."""
        sources = tuple(_absolute(source) for source in self.stream.sources)
        stream = replace(self.stream, sources=sources)
        return Bench(self.out.absolute(), stream, _absolute(self.model), self.device)


def make_shard(shard: int, bench: Bench) -> int:
    """Make a shard unless it is there; returns how many of the stream's rows it stands for.

    The model is loaded once per process.
    """
    maker = _maker(bench)
    if facts_of(shard_file(bench.out, shard)) is not None:
        return maker.manifest.rows_of(shard)
    return maker(shard, Bar("", 0, shown=False))


@functools.lru_cache(maxsize=1)
def _maker(bench: Bench) -> ShardMaker:
    if (manifest := read_manifest(bench.out)) is None:
        fix = "give a folder that every machine shares"
        raise RunError("no manifest there", where=str(bench.out), fix=fix)
    encoder = load_as(bench.model, bench.device, manifest)
    return ShardMaker(bench.out, manifest, bench.stream, encoder)


def _absolute(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


class ShardMaker:
    """Makes shards of a folder whose manifest stands; each call reads on in the stream."""

    def __init__(
        self, out: Path, manifest: Manifest, stream: Stream, encoder: SentenceTransformer
    ) -> None:
        self.out, self.manifest, self.encoder = out, manifest, encoder
        self._shards = stream.shards(manifest.shard_rows)

    def __call__(self, shard: int, bar: Bar) -> int:
        """Make a shard; returns how many of the stream's rows it stands for."""
        manifest = self.manifest
        # a source that grows meanwhile has more rows than were counted
        rows = [row for row in self._shards[shard] if row.number < manifest.rows]
        size = manifest.rows_of(shard)
        end = bar.done + size
        floats_ND, long_texts = self._embed(rows, bar)
        listed, floats_ND = all_rows(manifest, shard, rows, floats_ND)
        write_shard(self.out, manifest, shard, listed, stored(floats_ND, manifest), long_texts)
        # rows without a text were not counted, texts in parts too often
        bar.advance(end - bar.done)
        return size

    def _embed(self, rows: Sequence[TextRow], bar: Bar) -> tuple[NDArray[np.float32], int]:
        if not rows:
            return np.zeros((0, self.manifest.dimensions), np.float32), 0
        try:
            found = embed_as(self.encoder, [row.text for row in rows], self.manifest, bar)
        except DataError as error:
            # the text's number in the shard, to that of its row
            place = (error.where or "").removeprefix("text ")
            where = (
                f"row {rows[int(place) - 1].number:,} (from 0)" if place.isdigit() else error.where
            )
            raise DataError(
                error.problem,
                where=where,
                expected=error.expected,
                found=error.found,
                fix=error.fix,
            ) from error
        return found.embeddings_ND, found.long_texts


def embed_as(
    encoder: SentenceTransformer,
    texts: Sequence[str],
    options: EmbedOptions,
    bar: Bar | None = None,
) -> Embedded:
    """Embeddings of texts by the options, float32."""
    return embed(
        encoder,
        texts,
        role=options.role,
        long_texts=options.long_texts,
        max_tokens_per_batch=options.max_tokens_per_batch,
        normalise=options.normalise,
        bar=bar,
    )


def stored(floats_ND: NDArray[np.float32], manifest: Manifest) -> NDArray[Any]:
    """Embeddings in the precision of a folder, as sentence-transformers quantises them."""
    if manifest.precision == "float16":
        with np.errstate(over="ignore"):
            halves_ND = floats_ND.astype(np.float16)
        if not np.isfinite(halves_ND).all():
            fix = "choose --precision float32, or --normalise"
            raise DataError("an embedding is too large for float16", where=manifest.model, fix=fix)
        return halves_ND
    if manifest.ranges is None:
        return np.asarray(quantize_embeddings(floats_ND, manifest.precision))
    ranges_2D = np.asarray(manifest.ranges, np.float32)
    clipped_ND = np.clip(floats_ND, *ranges_2D)
    return np.asarray(quantize_embeddings(clipped_ND, manifest.precision, ranges_2D))


def load_as(model: str, device: str | None, options: EmbedOptions) -> SentenceTransformer:
    """The encoder that the options ask for, adapters in its weights."""
    return load(model, device, options.num_memory, options.backend, options.dtype, merged=True)

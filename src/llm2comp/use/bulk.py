"""Millions of texts → a folder of shards: what is there is not made again.

    prepare (shards.py)   refuse, read all rows once          → job
    embed_job             load, claim the folder, make each shard that is missing, name them all
    ShardMaker            one shard: read its rows, embed, store; used here, by workers and on Ray

A shard's batches hold its own texts alone, so it has the same bytes wherever a run began.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.util.quantization import quantize_embeddings

from llm2comp.data.streams import Stream, TextRow
from llm2comp.errors import DataError, RunError
from llm2comp.model.inputs import prompt_of
from llm2comp.storage.identity import identity
from llm2comp.storage.loading import load
from llm2comp.system.console import GENERAL, Bar, say
from llm2comp.system.files import explain_disk_errors
from llm2comp.use.embed import embed
from llm2comp.use.shards import (
    EmbedOptions,
    Job,
    Manifest,
    all_rows,
    claim_folder,
    facts_of,
    finish,
    prepare,
    shard_file,
    write_manifest,
    write_shard,
)
from llm2comp.use.writing import Embedded


def embed_files(
    inputs: Sequence[str | Path],
    out: str | Path,
    model: str | Path = GENERAL,
    options: EmbedOptions | None = None,
    device: str | None = None,
) -> str:
    """Embed the rows of files or Hub data sets into a folder of parquet shards; resumes it.

    Args:
        inputs: files, patterns (`texts/*.jsonl.gz`) or Hub data sets, read one after the other.
        out: the folder. One that holds other embeddings is refused, with what differs.
        model: as for `load`.
        options: how rows become embeddings.
        device: as for `load`.

    Returns:
        One line: how many embeddings, and how many texts were over the model's limit.

    Raises:
        DataError: a source that cannot be read, rows without a text, a text over the limit under
            `error`. RunError: a folder of others, or one that another process writes; a full disk.
    """
    job = prepare(inputs, Path(out).expanduser(), options or EmbedOptions())
    return embed_job(job, str(model), device)


def embed_job(job: Job, model: str, device: str | None = None) -> str:
    """Make the shards of a job that are not there. As `embed_files`."""
    say(job.survey.line)
    with _alone(job.out):
        encoder = load_as(model, device, job.options)
        manifest = _claim(job, model, encoder)
        maker = ShardMaker(job.out, manifest, job.stream, encoder)
        missing = [i for i in range(manifest.shards) if facts_of(shard_file(job.out, i)) is None]
        done = manifest.rows - sum(manifest.rows_of(shard) for shard in missing)
        with Bar("embed", manifest.rows, done, unit="rows") as bar:
            for shard in missing:
                maker(shard, bar)
        long_texts = finish(job.out, manifest)
    made = manifest.rows if manifest.bad_rows == "zero" else manifest.texts
    notes = f"; {long_texts:,} over the model's limit" * bool(long_texts)
    return (
        f"{job.out}: {made:,} embeddings of {manifest.dimensions} dimensions, "
        f"{manifest.precision}, in {manifest.shards:,} shards{notes}"
    )


class ShardMaker:
    """Makes shards of a folder whose manifest stands; each call reads on in the stream."""

    def __init__(
        self, out: Path, manifest: Manifest, stream: Stream, encoder: SentenceTransformer
    ) -> None:
        self.out, self.manifest, self.encoder = out, manifest, encoder
        self._shards = stream.shards(manifest.shard_rows)

    def __call__(self, shard: int, bar: Bar | None = None) -> int:
        """Make a shard; returns how many of the stream's rows it stands for."""
        manifest, rows = self.manifest, self._shards[shard]
        size = manifest.rows_of(shard)
        end = bar.done + size if bar is not None else 0
        floats_ND, long_texts = self._embed(rows, bar)
        listed, floats_ND = all_rows(manifest, shard, rows, floats_ND)
        write_shard(self.out, manifest, shard, listed, stored(floats_ND, manifest), long_texts)
        if bar is not None:  # rows without a text were not counted, texts in parts too often
            bar.advance(end - bar.done)
        return size

    def _embed(self, rows: Sequence[TextRow], bar: Bar | None) -> tuple[NDArray[np.float32], int]:
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


def _claim(job: Job, model: str, encoder: SentenceTransformer) -> Manifest:
    """The manifest of a job in its folder; made now unless it is there."""
    who = identity(model, encoder)
    manifest = Manifest(
        **job.known(),
        model=who.name,
        revision=who.revision,
        prompt=prompt_of(encoder, job.options.role),
        dimensions=encoder.get_embedding_dimension() or 0,
    )
    there = claim_folder(job.out, manifest)
    if there.ranges is not None or not there.precision.endswith("int8"):
        return there
    sample_ND = embed_as(encoder, job.survey.sample, job.options, Bar("", 0, shown=False))
    rows_ND = sample_ND.embeddings_ND
    ranges = (tuple(rows_ND.min(0).tolist()), tuple(rows_ND.max(0).tolist()))
    return write_manifest(job.out, there.model_copy(update={"ranges": ranges}))


def load_as(model: str, device: str | None, options: EmbedOptions) -> SentenceTransformer:
    """The encoder that the options ask for, adapters in its weights."""
    return load(model, device, options.num_memory, options.backend, options.dtype, merged=True)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold a folder's lock. Raises RunError if another process has it."""
    with explain_disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        fix = "wait for it, or give another --out"
        raise RunError("another process is embedding here", where=str(out), fix=fix) from error

"""Millions of texts → a folder of shards: what is there is not made again.

    prepare (shards.py)      refuse, read all rows once → job
    embed_job                load, claim the folder, make each shard that is missing, name them all
    ShardMaker (making.py)   one shard: here, in workers (workers.py), on a cluster (on_ray.py)

A shard's batches hold its own texts alone, so it has the same bytes wherever a run began.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from sentence_transformers import SentenceTransformer

from llm2comp.errors import DataError, RunError, missing_extra
from llm2comp.model.inputs import prompt_of
from llm2comp.storage.identity import identity
from llm2comp.system.console import GENERAL, Bar, WorkersOn, say
from llm2comp.system.files import explain_disk_errors
from llm2comp.use.making import Bench, ShardMaker, embed_as, load_as, make_shard
from llm2comp.use.on_ray import on_ray
from llm2comp.use.shards import (
    EmbedOptions,
    Job,
    Manifest,
    claim_folder,
    facts_of,
    finish,
    prepare,
    shard_file,
    write_manifest,
)
from llm2comp.use.workers import in_workers

LOGS = "_logs"


def embed_files(
    inputs: Sequence[str | Path],
    out: str | Path,
    model: str | Path = GENERAL,
    options: EmbedOptions | None = None,
    device: str | None = None,
    workers: int = 1,
    engine: WorkersOn = "local",
) -> str:
    """Embed the rows of files or Hub data sets into a folder of parquet shards; resumes it.

    Args:
        inputs: files, patterns (`texts/*.jsonl.gz`) or Hub data sets, read one after the other.
        out: the folder. One that holds other embeddings is refused, with what differs.
        model: as for `load`.
        options: how rows become embeddings.
        device: as for `load`.
        workers: processes at once, each with a model; with CUDA each has one device.
        engine: where these are: `local`, this machine, or `ray`, a cluster (extra `ray`).

    Returns:
        One line: how many embeddings, and how many texts were over the model's limit.

    Raises:
        DataError: a source that cannot be read, rows without a text, a text over the limit under
            `error`. RunError: a folder of others, or one that another process writes; a full disk.
    """
    job = prepare(inputs, Path(out).expanduser(), options or EmbedOptions())
    return embed_job(job, str(model), device, workers, engine)


def embed_job(
    job: Job, model: str, device: str | None = None, workers: int = 1, engine: WorkersOn = "local"
) -> str:
    """Make the shards of a job that are not there. As `embed_files`."""
    if workers > 1 and ":" in (device or ""):
        fix = "leave the number out: each worker takes a device of its own"
        raise DataError("is one device", where=f"device {device}", fix=fix)
    if engine == "ray" and find_spec("ray") is None:
        raise missing_extra(ModuleNotFoundError(name="ray")) or RuntimeError
    bench = Bench(job.out, job.stream, model, device)
    say(job.survey.line)
    with _alone(job.out):
        encoder = load_as(model, device, job.options)
        manifest = _claim(job, model, encoder)
        missing = [i for i in range(manifest.shards) if facts_of(shard_file(job.out, i)) is None]
        done = manifest.rows - sum(manifest.rows_of(shard) for shard in missing)
        with Bar("embed", manifest.rows, done, unit="rows") as bar:
            if missing and (engine == "ray" or workers > 1):
                del encoder  # each worker has its own, one of them on the device of this one
                gc.collect()
                torch.cuda.empty_cache()
            if not missing:
                pass
            elif engine == "ray":
                for rows in on_ray(missing, bench, workers):
                    bar.advance(rows)
            elif workers > 1:
                task = functools.partial(make_shard, bench=bench)
                (job.out / LOGS).mkdir(exist_ok=True)
                for rows in in_workers(task, missing, workers, job.out / LOGS):
                    bar.advance(rows)
            else:
                maker = ShardMaker(job.out, manifest, job.stream, encoder)
                for shard in missing:
                    maker(shard, bar)
        long_texts = finish(job.out, manifest)
    made = manifest.rows if manifest.bad_rows == "zero" else manifest.texts
    notes = f"; {long_texts:,} over the model's limit" * bool(long_texts)
    return (
        f"{job.out}: {made:,} embeddings of {manifest.dimensions} dimensions, "
        f"{manifest.precision}, in {manifest.shards:,} shards{notes}"
    )


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

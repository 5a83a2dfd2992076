"""Commands that use an encoder: embed, similarity."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm2comp.cli.embed_options import (
    BackendOption,
    BadRowsOption,
    KeepOption,
    LongTextsOption,
    NormaliseOption,
    PrecisionOption,
    RoleOption,
    ShardRowsOption,
    TextsArgument,
    VectorsOption,
    WorkersOnOption,
    WorkersOption,
)
from llm2comp.cli.options import (
    USE,
    ColumnOption,
    DeviceOption,
    DtypeOption,
    MemoryOption,
    ModelOption,
    TokensOption,
    app,
    column_advice,
    read_column,
)
from llm2comp.errors import DataError
from llm2comp.system.console import GENERAL, LongTexts, WorkersOn, say

if TYPE_CHECKING:
    from llm2comp.data.loaded import Loaded
    from llm2comp.use.shards import EmbedOptions

STDIN = "-"
STDIN_NAME = "standard-input.txt"


@app.command(rich_help_panel=USE)
def embed(
    inputs: TextsArgument,
    out: VectorsOption,
    model: ModelOption = GENERAL,
    column: ColumnOption = "text",
    role: RoleOption = None,
    long_texts: LongTextsOption = "truncate",
    bad_rows: BadRowsOption = "stop",
    max_tokens_per_batch: TokensOption = None,
    normalise: NormaliseOption = False,
    num_memory: MemoryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
    backend: BackendOption = "torch",
    keep: KeepOption = None,
    precision: PrecisionOption = "float32",
    shard_rows: ShardRowsOption = 2048,
    workers: WorkersOption = 1,
    engine: WorkersOnOption = "local",
) -> None:
    """Embed the texts of a file, in order; or of many into a folder, which can be gone on with."""
    from llm2comp.use.shards import EmbedOptions, folder_meant

    options = EmbedOptions(
        column=column,
        keep=tuple(keep or ()),
        role=role,
        long_texts=long_texts,
        bad_rows=bad_rows,
        normalise=normalise,
        precision=precision,
        num_memory=num_memory,
        max_tokens_per_batch=max_tokens_per_batch,
        dtype=dtype,
        backend=backend,
        shard_rows=shard_rows,
    )
    if folder_meant(out):
        _embed_folder(inputs, Path(out).expanduser(), model, options, device, workers, engine)
    else:
        beyond = {"--workers": workers > 1, "--engine": engine == "ray"}
        _embed_file(inputs, Path(out), model, options, device, [o for o in beyond if beyond[o]])


def _embed_folder(
    inputs: list[str],
    out: Path,
    model: str,
    options: EmbedOptions,
    device: str | None,
    workers: int,
    engine: WorkersOn,
) -> None:
    if STDIN in inputs:
        fix = "write it to a file first"
        raise DataError("cannot be read again to go on", where="standard input", fix=fix)
    from llm2comp.use.shards import prepare

    with column_advice(options.column):
        job = prepare(inputs, out, options)
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.use.bulk import embed_job

    say(embed_job(job, model, device, workers, engine))


def _embed_file(
    inputs: list[str],
    out: Path,
    model: str,
    options: EmbedOptions,
    device: str | None,
    beyond: list[str],
) -> None:
    from llm2comp.use import writing
    from llm2comp.use.shards import refuse_folder_options

    source = inputs[0]
    writing.check_output(out, [] if source == STDIN else [Path(source).expanduser()])
    refuse_folder_options(inputs, options, beyond)
    loaded = _read_source(source, options.column)
    named = "standard input" if source == STDIN else source
    places = writing.places_of(loaded, options.bad_rows, named)
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.model.inputs import frame_of
    from llm2comp.use.embed import room_of
    from llm2comp.use.making import embed_as, load_as

    encoder = load_as(model, device, options)
    result = embed_as(encoder, loaded.rows, options)
    writing.write_embeddings(out, result, loaded.rows, places)
    room = room_of(encoder, frame_of(encoder, options.role), "")
    notes = _cut_note(result.long_texts, room, options.long_texts)
    if places and places.zero and loaded.skipped:
        notes += f"; zeros in the place of {places.rows - loaded.used:,} rows"
    elif places and not places.zero:
        notes += (
            "; their rows (from 0): "
            f"{writing.rows_file(out) if out.suffix == '.npy' else 'column row'}"
        )
    count, dimensions = result.embeddings_ND.shape
    say(f"{out}: {count:,} embeddings of {dimensions} dimensions{notes}")


@app.command(rich_help_panel=USE)
def similarity(
    texts: Annotated[list[str], typer.Argument(help="Two texts or more.", metavar="TEXT")],
    model: ModelOption = GENERAL,
    device: DeviceOption = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Print the cosine similarity of every pair of texts."""
    if len(texts) < 2:
        raise DataError("nothing to compare", expected="two texts or more", found=len(texts))
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.storage.loading import load
    from llm2comp.use.embed import embed as embed_texts

    vectors = embed_texts(
        load(model, device, dtype=dtype, merged=True), texts, normalise=True
    ).embeddings_ND
    for text, row in zip(texts, vectors @ vectors.T, strict=True):
        line = " ".join(text.split())
        print(
            " ".join(f"{cosine:6.3f}" for cosine in row),
            "",
            line if len(line) <= 60 else line[:57] + "...",
        )


def _cut_note(count: int, limit: int, policy: LongTexts) -> str:
    """Note on texts over the model's limit, and what was done with them."""
    done = (
        "read in parts"
        if policy == "chunk-mean"
        else "cut there: --long-texts chunk-mean reads them whole"
    )
    return f"; {count:,} over the model's limit of {limit:,} tokens, {done}" if count else ""


def _read_source(source: str, column: str) -> Loaded[str]:
    """Texts of a file, or the lines of standard input; says what was left out."""
    if source != STDIN:
        return read_column(source, column)
    # so that lines are read as those of any text file
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / STDIN_NAME
        with file.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        try:
            return read_column(str(file))
        except DataError as error:
            raise DataError(
                error.problem, where="standard input", expected="a text per line", found=error.found
            ) from None

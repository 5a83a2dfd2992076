"""Command line: argument names are recipe field names; heavy imports wait until a command needs them."""

from __future__ import annotations

import shutil
import sys
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from llm2comp.errors import Llm2CompError

app = typer.Typer(
    help="Turn a causal language model into a text encoder by context compression (LLM2Comp).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
STDIN_NAME = "standard-input.txt"
STOPPED = 130


class LongTexts(StrEnum):
    """What to do with texts over the model's limit."""

    truncate = "truncate"
    chunk_mean = "chunk-mean"
    error = "error"


class Role(StrEnum):
    """Which stored prompt to use."""

    query = "query"
    document = "document"


ModelArgument = Annotated[Path, typer.Option("--model", "-m", help="Model folder, run directory, or stage of a run.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best there is.")]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe (tiny, llama2-7b-paper, ...).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes: key.sub=value ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<recipe name>.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved plan and what it will need; train nothing.")
    ] = False,
) -> None:
    """Train a recipe; run again to go on where it stopped."""
    from llm2comp.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        from llm2comp.training.plan import show_plan

        show_plan(resolved)
        return
    from llm2comp.console import say
    from llm2comp.training.run import MODEL_FOLDER
    from llm2comp.training.run import train as run_recipe

    say(f"finished: {run_recipe(resolved, out) / MODEL_FOLDER}")


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo")) -> None:
    """Whole path in minutes: embedded backbone and your Python's documentation → encoder, scores, a search."""
    from llm2comp.demo import demo as run_demo

    run_demo(out)


@app.command()
def embed(
    source: Annotated[
        str, typer.Argument(help="Text file, jsonl, csv, parquet (also .gz, .zst), or - for lines on standard input.")
    ],
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .npy, .parquet or .jsonl.")],
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    role: Annotated[Role | None, typer.Option(help="Use the model's prompt for this role.")] = None,
    long_texts: Annotated[LongTexts, typer.Option(help="Texts over the model's limit.")] = LongTexts.truncate,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 32,
    normalise: Annotated[bool, typer.Option(help="Scale embeddings to length 1.")] = False,
    device: DeviceOption = None,
) -> None:
    """Embed a file's texts, in order."""
    from llm2comp import embed as bulk
    from llm2comp.backbone.quiet import quiet_libraries
    from llm2comp.console import say

    bulk.check_output(out)
    texts = _read_source(source, column)
    quiet_libraries()
    from llm2comp.loading import load

    result = bulk.embed(
        load(model, device),
        texts,
        role=role.value if role else None,
        long_texts=long_texts.value,
        batch_size=batch_size,
        normalise=normalise,
    )
    bulk.write_embeddings(out, result, texts)
    cut = f"; {result.long_texts:,} over the limit ({long_texts.value})" if result.long_texts else ""
    say(f"{out}: {result.embeddings_ND.shape[0]:,} embeddings of {result.embeddings_ND.shape[1]} dimensions{cut}")


@app.command()
def similarity(
    texts: Annotated[list[str], typer.Argument(help="Two texts or more.")],
    model: ModelArgument,
    device: DeviceOption = None,
) -> None:
    """Print the cosine between texts, each with each."""
    from llm2comp.errors import DataError

    if len(texts) < 2:
        raise DataError("nothing to compare", expected="two texts or more", found=len(texts))
    from llm2comp.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.embed import embed as embed_texts
    from llm2comp.loading import load

    vectors = embed_texts(load(model, device), texts, normalise=True).embeddings_ND
    for text, row in zip(texts, vectors @ vectors.T, strict=True):
        line = " ".join(text.split())
        print(" ".join(f"{cosine:6.3f}" for cosine in row), "", line if len(line) <= 60 else line[:57] + "...")


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="Exported model folder.")]) -> None:
    """Recompute a model folder's stored embeddings."""
    from llm2comp.backbone.quiet import quiet_libraries
    from llm2comp.console import say

    quiet_libraries()
    from llm2comp.export import verify as check

    say(f"{folder}: sound, lowest cosine {check(folder):.7f}")


def _read_source(source: str, column: str) -> list[str]:
    """Texts of a file, or the lines of standard input; says what was left out."""
    from llm2comp.console import say
    from llm2comp.data.sources import read_texts
    from llm2comp.errors import DataError
    from llm2comp.recipe import TextData

    if source != "-":
        loaded = read_texts(TextData(source=source, column=column))
    else:
        with tempfile.TemporaryDirectory() as folder:  # so that lines are read as those of any text file
            file = Path(folder) / STDIN_NAME
            with file.open("wb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            try:
                loaded = read_texts(TextData(source=str(file)))
            except DataError as error:
                raise DataError(error.problem, where="standard input", expected="a text per line", found=error.found) from None
    say(loaded.summary())
    return loaded.rows


def main() -> None:
    """Entry point: an error of ours, or of the disk, is one message and exit code 1, never a traceback."""
    try:
        app(prog_name="llm2comp")
    except Llm2CompError as error:
        _fail(str(error))
    except OSError as error:  # one that nobody nearer has explained: a full disk, a folder that is not ours
        _fail(f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != STOPPED:
            raise
        print("stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(STOPPED)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()

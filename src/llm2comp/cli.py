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
REPORT_FILE = "report.html"
STDIN_NAME = "standard-input.txt"
STOPPED = 130
OUT_OF_MEMORY = (
    "lower batch_size, or set gradient_checkpointing: true or (stages 2 and 3) mini_batch_size: 16; "
    "`--dry-run` estimates what a recipe needs, --batch-size limits evaluation"
)


class LongTexts(StrEnum):
    """What to do with texts over the model's limit."""

    truncate = "truncate"
    chunk_mean = "chunk-mean"
    error = "error"


class Role(StrEnum):
    """Which stored prompt to use."""

    query = "query"
    document = "document"


MODEL_HELP = "Model folder, run directory, stage of a run, Hub id, or KIND:LM (untrained; mean, echo, ... docs/baselines.md)."
ModelArgument = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
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
    from llm2comp.report import report as write_report
    from llm2comp.training.run import MODEL_FOLDER, is_main_process
    from llm2comp.training.run import train as run_recipe

    run = run_recipe(resolved, out)
    if is_main_process():
        say(f"finished: {run / MODEL_FOLDER}")
        say(f"report: {write_report([run], run / REPORT_FILE)}")


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


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help=f"{MODEL_HELP} Also: tfidf.")],
    tasks: Annotated[
        list[str] | None, typer.Option(help="paper14, or a task or benchmark of mteb's, such as 'MTEB(eng, v2)'; repeatable.")
    ] = None,
    local: Annotated[list[Path] | None, typer.Option(help="Folder of local evaluation sets (docs/evaluate.md).")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of results; default: scores/ in the model's run, else here.")] = None,
    compare: Annotated[bool, typer.Option(help="Show models evaluated before and the published figures beside.")] = False,
    instructions: Annotated[
        str, typer.Option(help="auto: the paper's for models trained with instructions; none; or a YAML file of task: text.")
    ] = "auto",
    template: Annotated[str, typer.Option(help="How an instruction stands before a text.")] = "{instruction}:",
    batch_size: Annotated[str, typer.Option(help="Texts at once; auto: as many as fit.")] = "auto",
    rehearse: Annotated[bool, typer.Option(help="Made-up data in place of the real: does it all run? No scores.")] = False,
    device: DeviceOption = None,
) -> None:
    """Evaluate models on mteb's tasks or on local sets; run again to go on where it stopped."""
    from llm2comp.backbone.quiet import quiet_libraries
    from llm2comp.console import say
    from llm2comp.errors import DataError, RunError

    if batch_size != "auto" and not (batch_size.isdigit() and int(batch_size)):
        raise DataError("no batch size", where="--batch-size", expected="auto or a number above 0", found=batch_size)
    if "{instruction}" not in template:
        raise DataError("no template", where="--template", expected="a text with {instruction} in it", found=template)
    quiet_libraries()
    from llm2comp import evaluate as evaluation

    size = None if batch_size == "auto" else int(batch_size)
    options = evaluation.Options(tuple(tasks or ()), tuple(local or ()), instructions, template, size, rehearse, device)
    rows = evaluation.evaluate(models, options, out)
    before = evaluation.earlier_rows(rows, evaluation.results_folder(models[0], out)) if compare else []
    say(evaluation.table([*before, *rows], compare))
    if failed := {task for row in rows for task in row.failed}:
        raise RunError(f"{len(failed)} tasks could not be run: {', '.join(sorted(failed))}", fix="see above, then run it again")


@app.command()
def analyze(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    texts: Annotated[str, typer.Option(help="File of texts, more of them than the embedding has dimensions.")],
    pairs: Annotated[str | None, typer.Option(help="File of related texts, columns anchor and positive.")] = None,
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    limit: Annotated[int, typer.Option(min=2, help="Use at most so many texts and pairs.")] = 5000,
    out: Annotated[Path | None, typer.Option(help="Folder to write; default: analysis/ in the model's run, else here.")] = None,
    threshold: Annotated[float, typer.Option(min=-1, max=1, help="Mean cosine from which memory tokens are merged.")] = 0.9,
    write_weights: Annotated[bool, typer.Option("--write-weights", help="Store cluster-then-merge in the model.")] = False,
    device: DeviceOption = None,
) -> None:
    """See why a model is good: collapse, what counts as similar, what its memory tokens hold."""
    from llm2comp.backbone.quiet import quiet_libraries
    from llm2comp.console import say
    from llm2comp.data.sources import read_pairs, read_texts
    from llm2comp.recipe import PairData, TextData

    loaded = read_texts(TextData(source=texts, column=column, limit=limit))
    say(loaded.summary())
    related = read_pairs(PairData(source=pairs, limit=limit)).rows if pairs else []
    quiet_libraries()
    from llm2comp import analyze as analysis

    found = analysis.analyze(model, loaded.rows, related, threshold=threshold, needs_memory=write_weights, device=device)
    folder = out or analysis.default_folder(model)
    analysis.write_analysis(found, folder)
    say(analysis.table(found))
    for line in analysis.readout_lines(found):
        say(line)
    say(f"{folder}: {analysis.ANALYSIS_FILE} and plots")
    if write_weights and (weights := found.merge_weights):
        for changed in analysis.write_weights(model, weights):
            say(f"{changed}: memory tokens now weigh {', '.join(f'{weight:.3f}' for weight in weights)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="Page to write; default: report.html in the first run.")] = None,
) -> None:
    """One self-contained HTML page about training runs: curves, spectra, memory tokens, scores, settings."""
    from llm2comp.backbone.quiet import quiet_libraries
    from llm2comp.console import say

    quiet_libraries()
    from llm2comp.report import report as write_report

    say(f"report: {write_report(runs, out or runs[0] / REPORT_FILE)}")


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
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch for --help
            raise
        _fail(f"out of device memory: {OUT_OF_MEMORY}")
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

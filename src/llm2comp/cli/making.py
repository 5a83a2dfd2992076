"""Commands that make encoders: train, demo, generate-responses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from llm2comp.cli.options import DeviceOption, app

REPORT_FILE = "report.html"


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="YAML file, or the name of a shipped recipe (tiny, llama2-7b-paper, ...).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes: key.sub=value ...")] = None,
    out: Annotated[Path | None, typer.Option(help="Run directory; default runs/<recipe name>.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan: data, memory, time; refuse what training would; train nothing.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="With --dry-run: the resolved recipe as well.")] = False,
) -> None:
    """Train a recipe; run again to go on where it stopped."""
    from llm2comp.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if dry_run:
        from llm2comp.training.plan import show_plan

        show_plan(resolved, verbose)
        return
    from llm2comp.console import say
    from llm2comp.report import report as write_report
    from llm2comp.training.ranks import is_main_process
    from llm2comp.training.run import MODEL_FOLDER
    from llm2comp.training.run import train as run_recipe

    run = run_recipe(resolved, out)
    if is_main_process():
        model = run / MODEL_FOLDER
        say(f"finished: {model}" if model.is_dir() else f"finished: {run}, to be loaded live: no model/ (docs/memory.md)")
        say(f"report: {write_report([run], run / REPORT_FILE)}")


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Run directory.")] = Path("runs/demo")) -> None:
    """Whole path in minutes: embedded backbone and your Python's documentation → encoder, scores, a search."""
    from llm2comp.demo import demo as run_demo

    run_demo(out)


@app.command()
def generate_responses(
    model: Annotated[str, typer.Option("--model", "-m", help="Causal LM: Hub id, local folder, or builtin:tiny.")],
    texts: Annotated[str, typer.Option(help="File of texts, or a Hub data set (its split train).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; run again to go on.")],
    column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many texts.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest prompt; the text in a longer one is cut.")] = 1024,
    prompt: Annotated[str, typer.Option(help="What the LM is told.")] = "{text}",
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template/--no-chat-template", help="Through the tokenizer's template; default: if it has one."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy; above: drawn at random.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing.")] = 0,
    teacher: Annotated[str | None, typer.Option(help="Encoder whose embeddings of the responses are kept as well.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Texts per shard.")] = 1000,
    shards: Annotated[str, typer.Option(help="i/n: the i-th of n shares, so that n machines can share a folder.")] = "1/1",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 16,
    revision: Annotated[str | None, typer.Option(help="Hub branch, tag or commit of the model.")] = None,
    device: DeviceOption = None,
) -> None:
    """Let a causal LM respond to texts, for stage 1's objective `response` (docs/response.md)."""
    from llm2comp.backbone.quiet import quiet_libraries
    from llm2comp.console import say
    from llm2comp.data.sources import read_texts
    from llm2comp.errors import DataError
    from llm2comp.recipe import TextData

    found = re.fullmatch(r"(\d+)/(\d+)", shards)
    share = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= share[0] <= share[1]:
        raise DataError("no share", where="--shards", expected="i/n with i from 1 to n, such as 2/8", found=shards)
    loaded = read_texts(TextData(source=texts, column=column, limit=limit))
    say(loaded.summary())
    quiet_libraries()
    from llm2comp import generate

    options = generate.Options(
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        prompt=prompt,
        chat_template=chat_template,
        temperature=temperature,
        seed=seed,
        teacher=teacher,
        shard_size=shard_size,
        batch_size=batch_size,
        revision=revision,
        device=device,
    )
    say(generate.generate_responses(model, loaded.rows, out, options, share))

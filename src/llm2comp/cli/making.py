"""Commands that make encoders: fetch, train, demo, generate-responses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from llm2comp.cli.options import MAKE, DeviceOption, app, read_column
from llm2comp.errors import DataError, RecipeError, missing_extra
from llm2comp.system.console import say

REPORT_FILE = "report.html"


# The language model that the demonstration makes an encoder of.
DemoLM = Literal["smollm2", "tiny"]


@app.command(rich_help_panel=MAKE)
def fetch(
    model: Annotated[
        str, typer.Argument(help="builtin:smollm2, or a GGUF file to convert.", metavar="LM")
    ] = "builtin:smollm2",
) -> None:
    """Download a language model into the cache, so that later commands need no network. Prints its
    folder.
    """
    from llm2comp.model.backbone.sources import fetch as get

    print(get(model))


@app.command(rich_help_panel=MAKE)
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            help="YAML file, or the name of a recipe of the package (tiny, qwen3-0.6b, ...).",
            metavar="RECIPE",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the recipe, such as ucl.steps=500.", metavar="KEY=VALUE"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; default: runs/ and the recipe's name.", metavar="DIR"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the plan: data, memory, hours.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="With --dry-run: also print the resolved recipe.")
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: predict hours, memory and price on one rtx4090, l40s, a100, "
            "h100 or h200.",
            metavar="NAME",
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="With --gpu: its price per hour.", metavar="X")
    ] = None,
) -> None:
    """Train a recipe. Run it again to resume."""
    from llm2comp.data.sources import check_sources
    from llm2comp.recipe import load_recipe

    _check_gpu(gpu, price, dry_run)
    resolved = load_recipe(recipe, overrides or [])
    check_sources(spec for stage in resolved.stages.values() for spec in stage.data)  # type: ignore[attr-defined]
    if dry_run:
        from llm2comp.lab.train import local_sets
        from llm2comp.training.cost import gpu_named
        from llm2comp.training.plan import show_plan

        show_plan(resolved, verbose, gpu_named(gpu, price) if gpu else None, local_sets)
        return
    from llm2comp.lab.train import train as run_recipe
    from llm2comp.runs.folder import MODEL_FOLDER
    from llm2comp.training.ranks import is_main_process

    run = run_recipe(resolved, out)
    if is_main_process():
        say(f"finished: {run / MODEL_FOLDER}")
        try:
            from llm2comp.lab.report import report as write_report

            say(f"report: {write_report([run], run / REPORT_FILE)}")
        except ModuleNotFoundError as error:  # trained without the lab
            if (missing := missing_extra(error)) is None:
                raise
            say(f"no report: {missing.problem}; {missing.fix}, then `llm2comp report {run}`")


def _check_gpu(gpu: str | None, price: float | None, dry_run: bool) -> None:
    """Refuse --gpu and --price where they have no effect."""
    if gpu and not dry_run or price is not None and not gpu:
        alone, missing = ("--gpu", "--dry-run") if gpu else ("--price", "--dry-run --gpu NAME")
        raise RecipeError("has no effect alone", where=alone, expected=f"{missing} beside it")


@app.command(rich_help_panel=MAKE)
def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; default: runs/demo, or runs/demo-tiny.", metavar="DIR"
        ),
    ] = None,
    lm: Annotated[
        DemoLM, typer.Option(help="smollm2: 135 M parameters; tiny: 5 M, some minutes.")
    ] = "smollm2",
) -> None:
    """Try everything: train an encoder on your Python's documentation, score it, search with it."""
    from llm2comp.lab.demo import RECIPES
    from llm2comp.lab.demo import demo as run_demo

    run_demo(out or Path("runs") / ("demo" if lm == "smollm2" else f"demo-{lm}"), RECIPES[lm])


@app.command(rich_help_panel=MAKE)
def generate_responses(
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Causal LM: Hub id, folder or GGUF file.", metavar="LM"),
    ],
    texts: Annotated[
        str,
        typer.Option(help="File of texts, or a Hub data set (its split train).", metavar="FILE"),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder to write; run again to resume.", metavar="DIR"),
    ],
    column: Annotated[
        str, typer.Option(help="Column that holds the text.", metavar="NAME")
    ] = "text",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use the first N texts.", metavar="N")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest response, in tokens.", metavar="N")
    ] = 64,
    max_tokens: Annotated[
        int,
        typer.Option(min=2, help="Longest prompt, in tokens; longer texts are cut.", metavar="N"),
    ] = 1024,
    prompt: Annotated[
        str, typer.Option(help="Prompt for the LM; {text} is the text.", metavar="TEXT")
    ] = "{text}",
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Use the tokenizer's chat template; default: if it has one.",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: greedy decoding; above 0: sampling.", metavar="X")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.", metavar="N")] = 0,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Encoder; its embeddings of the responses are stored, too.", metavar="MODEL"
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Texts per file.", metavar="N")] = 1000,
    shards: Annotated[
        str,
        typer.Option(
            help="2/8: work on the second of eight shares of the texts (several machines).",
            metavar="I/N",
        ),
    ] = "1/1",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.", metavar="N")] = 16,
    revision: Annotated[
        str | None, typer.Option(help="Hub branch, tag or commit of the model.", metavar="NAME")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Generate a causal LM's responses to texts, for stage 1's objective `response`
    (docs/response.md).
    """
    from llm2comp.system.files import RESPONSES, refuse_taken

    found = re.fullmatch(r"(\d+)/(\d+)", shards)
    share = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= share[0] <= share[1]:
        raise DataError(
            "no share",
            where="--shards",
            expected="i/n with i from 1 to n, such as 2/8",
            found=shards,
        )
    refuse_taken(out, RESPONSES)
    loaded = read_column(texts, column, limit)
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.training import generate

    options = generate.ResponseOptions(
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

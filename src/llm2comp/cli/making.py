"""Commands that make encoders: fetch, train, demo, generate-responses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from llm2comp.cli.options import MAKE, ColumnOption, DeviceOption, app, read_column
from llm2comp.cli.response_options import (
    BatchSizeOption,
    ChatTemplateOption,
    FirstTextsOption,
    MaxNewTokensOption,
    PromptedTextsOption,
    PromptOption,
    PromptTokensOption,
    ResponderOption,
    ResponsesOption,
    RevisionOption,
    SeedOption,
    ShardSizeOption,
    ShardsOption,
    TeacherOption,
    TemperatureOption,
)
from llm2comp.cli.train_options import (
    DryRunOption,
    GpuOption,
    OverridesArgument,
    PriceOption,
    RecipeArgument,
    RunOption,
    VerboseOption,
)
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
    """Download a language model into the cache, so that later commands need no network.

    Prints its folder.
    """
    from llm2comp.model.backbone.sources import fetch as get

    print(get(model))


@app.command(rich_help_panel=MAKE)
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    out: RunOption = None,
    dry_run: DryRunOption = False,
    verbose: VerboseOption = False,
    gpu: GpuOption = None,
    price: PriceOption = None,
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
    model: ResponderOption,
    texts: PromptedTextsOption,
    out: ResponsesOption,
    column: ColumnOption = "text",
    limit: FirstTextsOption = None,
    max_new_tokens: MaxNewTokensOption = 64,
    max_tokens: PromptTokensOption = 1024,
    prompt: PromptOption = "{text}",
    chat_template: ChatTemplateOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    teacher: TeacherOption = None,
    shard_size: ShardSizeOption = None,
    shards: ShardsOption = "1/1",
    batch_size: BatchSizeOption = 16,
    revision: RevisionOption = None,
    device: DeviceOption = None,
) -> None:
    """Generate a causal LM's responses to texts, for stage 1's `response` (docs/response.md)."""
    from llm2comp.system.folders import RESPONSES, refuse_taken

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
    from llm2comp.training.generate import generate_responses as generate
    from llm2comp.training.responder import ResponseOptions

    options = ResponseOptions(
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
    say(generate(model, loaded.rows, out, options, share))

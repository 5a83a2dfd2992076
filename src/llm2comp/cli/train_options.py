"""The options of `train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="YAML file, or the name of a recipe of the package (tiny, qwen3-0.6b, ...).",
        metavar="RECIPE",
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the recipe, such as ucl.steps=500.", metavar="KEY=VALUE"),
]
RunOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the run; default: runs/ and the recipe's name.", metavar="DIR"),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Only show the plan: data, memory, hours.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", help="With --dry-run: also print the resolved recipe.")
]
GpuOption = Annotated[
    str | None,
    typer.Option(
        help="With --dry-run: predict hours, memory and price on one rtx4090, l40s, a100, "
        "h100 or h200.",
        metavar="NAME",
    ),
]
PriceOption = Annotated[
    float | None, typer.Option(min=0, help="With --gpu: its price per hour.", metavar="X")
]

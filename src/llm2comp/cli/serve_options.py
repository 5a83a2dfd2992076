"""The options of `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2comp.cli.options import MODEL_HELP

ServedArgument = Annotated[
    str | None,
    typer.Argument(
        help=f"{MODEL_HELP} Default: the model of --db, or builtin:general.", metavar="MODEL"
    ),
]
IndexOption = Annotated[
    Path | None,
    typer.Option(help="Index of documents to search (docs/search.md).", metavar="DIR"),
]
LensOption = Annotated[
    bool,
    typer.Option(
        "--with-lm",
        help="Keep the frozen LM: the page shows what it reads in a text's memory. Slower.",
    ),
]
HostOption = Annotated[
    str, typer.Option(help="Address to listen at; 0.0.0.0: all of them.", metavar="HOST")
]
PortOption = Annotated[
    int, typer.Option(min=0, max=65535, help="Port; 0: any that is free.", metavar="N")
]
KeyFileOption = Annotated[
    Path | None,
    typer.Option(help="File of API keys, one a line; callers then need one.", metavar="FILE"),
]
KeyOption = Annotated[str | None, typer.Option(hidden=True, envvar="LLM2COMP_API_KEY")]
NameOption = Annotated[
    str | None,
    typer.Option(help="What callers call the model; default: its own name.", metavar="NAME"),
]
MaxTextsOption = Annotated[int, typer.Option(min=1, help="Texts in one request.", metavar="N")]
WaitingOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Refuse requests (429) while so many tokens wait; default: 64 batches.",
        metavar="N",
    ),
]
DeadlineOption = Annotated[
    float, typer.Option(min=0.1, help="Seconds within which a request is answered.", metavar="S")
]

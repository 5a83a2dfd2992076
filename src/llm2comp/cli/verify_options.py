"""Options of `llm2comp verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2comp.system.console import Prompts

CheckedArgument = Annotated[
    Path, typer.Argument(help="Exported model folder, or a finished run.", metavar="DIR")
]
UrlOption = Annotated[
    str | None,
    typer.Option(
        help="Hold a running server against the folder: its address. OpenAI's /v1/embeddings or "
        "text-embeddings-inference's /embed (docs/clients.md).",
        metavar="URL",
    ),
]
PromptsOption = Annotated[
    Prompts,
    typer.Option(
        help="Who puts the stored prompt before a query: the server, told the role, or its client.",
        metavar="WHO",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--model-name",
        help="Name in requests; default: the first the server lists.",
        metavar="NAME",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        envvar="LLM2COMP_API_KEY", help="Sent as a bearer token.", metavar="KEY", show_envvar=True
    ),
]

"""Commands that fit an encoder to a user's own documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2comp.cli.options import MAKE, DeviceOption, ModelOption, app
from llm2comp.errors import DataError, ModelFolderError
from llm2comp.recipe import missing_path
from llm2comp.system.console import GENERAL

DocumentsArgument = Annotated[
    str,
    typer.Argument(
        help="Folder of documents (.md, .txt, .rst, .html, .pdf, .docx, .ipynb, .jsonl, source "
        "code), one such file, or builtin:python-docs.",
        metavar="DOCS",
    ),
]
MinutesOption = Annotated[
    float, typer.Option(min=0.1, help="For scoring and training together.", metavar="N")
]
RetentionOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of evaluation sets on which nothing should be lost; repeatable.", metavar="DIR"
    ),
]
NegativesOption = Annotated[
    int, typer.Option(min=0, max=8, help="Hard negatives mined for each pair.", metavar="N")
]
GuideOption = Annotated[
    bool, typer.Option(help="Let the starting encoder take false negatives out of the batches.")
]


@app.command(rich_help_panel=MAKE)
def adapt(
    documents: DocumentsArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run; default: runs/NAME-adapted.", metavar="RUN"),
    ] = None,
    model: ModelOption = GENERAL,
    minutes: MinutesOption = 10.0,
    retention: RetentionOption = None,
    negatives: NegativesOption = 0,
    guide: GuideOption = True,
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.", metavar="N")] = 0,
) -> None:
    """Fit an encoder to your documents without labels, and say whether it is worth using."""
    if not documents.startswith("builtin:") and not Path(documents).exists():
        raise DataError("no such file or folder", where=documents)
    for name, given in (("--model", model), *(("--retention", str(f)) for f in retention or ())):
        if (nearest := missing_path(given)) is not None:
            raise ModelFolderError(
                "no such folder", where=f"{name} {given}", found=f"there is {nearest}"
            )
    from llm2comp.system.folders import RUN, refuse_taken

    if out is not None:
        refuse_taken(out, RUN)
    from llm2comp.lab.adapt import adapt as fit

    fit(
        documents,
        out,
        model,
        minutes,
        retention=retention or (),
        negatives=negatives,
        guide=guide,
        device=device,
        seed=seed,
    )

"""The options of `embed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llm2comp.system.console import BadRows, LongTexts, Role

# What runs the model.
Backend = Literal["torch", "openvino", "onnx"]

TextsArgument = Annotated[
    str,
    typer.Argument(
        help="File of texts: txt, jsonl, csv, parquet, ..., or - for lines on standard input.",
        metavar="FILE",
    ),
]
VectorsOption = Annotated[
    Path,
    typer.Option("--out", "-o", help="File to write: .npy, .parquet or .jsonl.", metavar="FILE"),
]
RoleOption = Annotated[
    Role | None,
    typer.Option(
        help="query or document: put the model's prompt for it before each text.", metavar="ROLE"
    ),
]
LongTextsOption = Annotated[
    LongTexts,
    typer.Option(
        help="Texts over the model's limit: truncate, chunk-mean or error.", metavar="HOW"
    ),
]
BadRowsOption = Annotated[
    BadRows,
    typer.Option(
        help="Rows without a text: stop; skip them (and write row numbers, docs/data.md); "
        "or write zero vectors (zero).",
        metavar="HOW",
    ),
]
NormaliseOption = Annotated[bool, typer.Option("--normalise", help="Scale embeddings to length 1.")]
BackendOption = Annotated[
    Backend,
    typer.Option(
        help="What runs the model: torch, openvino or onnx (docs/speed.md).", metavar="NAME"
    ),
]

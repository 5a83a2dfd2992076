"""The options of `embed`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llm2comp.system.console import BadRows, LongTexts, Precision, Role, WorkersOn

# What runs the model.
Backend = Literal["torch", "openvino", "onnx"]

TextsArgument = Annotated[
    list[str],
    typer.Argument(
        help="Files of texts (txt, jsonl, csv, parquet, ...), patterns, Hub data sets; - for lines "
        "on standard input. Several go into a folder.",
        metavar="INPUT",
    ),
]
VectorsOption = Annotated[
    str,
    typer.Option(
        "--out",
        "-o",
        help="File to write: .npy, .parquet or .jsonl; or a folder of shards, which ends in / "
        "(docs/embed.md).",
        metavar="FILE|DIR/",
    ),
]
# Of folders alone.
KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep", help="Folder: column to keep, such as id; repeatable.", metavar="NAME"),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        help="Folder: float32, float16, int8, uint8, binary or ubinary (docs/embed.md).",
        metavar="TYPE",
    ),
]
WorkersOption = Annotated[
    int,
    typer.Option(
        min=1, help="Folder: processes at once; with CUDA each has one device.", metavar="N"
    ),
]
WorkersOnOption = Annotated[
    WorkersOn,
    typer.Option(
        help="Folder: where the workers are: local or ray (docs/embed.md).", metavar="NAME"
    ),
]
ShardRowsOption = Annotated[int, typer.Option(min=1, help="Folder: rows per shard.", metavar="N")]
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

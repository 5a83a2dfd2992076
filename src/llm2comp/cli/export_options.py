"""Options of `llm2comp export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llm2comp.system.console import Dtype, Engine, MemoryPooling

OutArgument = Annotated[
    Path,
    typer.Argument(help="Folder to write; only an earlier export is replaced.", metavar="DIR"),
]
MultiVectorOption = Annotated[
    bool,
    typer.Option(
        "--multi-vector", help="Keep all memory states of a text, for MultiVectorEncoder."
    ),
]
StoredDtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Type of the stored weights: float32, bfloat16, float16; auto: that of the encoder.",
        metavar="TYPE",
    ),
]
PoolingOption = Annotated[
    MemoryPooling | None,
    typer.Option(
        help="last: the last memory state alone, which every engine can read; mean: all by their "
        "weights. Default: last if the recipe nests 1 (docs/memory.md), else mean.",
        metavar="HOW",
    ),
]
OpenvinoOption = Annotated[
    Literal["float32", "bfloat16", "int8"] | None,  # what it computes in; int8: its weights
    typer.Option(
        help="Add a graph for OpenVINO: float32, bfloat16 or int8 (docs/speed.md).", metavar="TYPE"
    ),
]
EngineOption = Annotated[
    Engine,
    typer.Option(
        "--for",
        help="What will run it: sentence-transformers, tei (text-embeddings-inference), vllm, "
        "llama.cpp (docs/clients.md).",
        metavar="ENGINE",
    ),
]

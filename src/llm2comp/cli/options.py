"""The app, and the options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Turn a causal language model into a text encoder by context compression (LLM2Comp).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

MODEL_HELP = (
    "Model folder, run directory, stage of a run, Hub id, builtin:general (comes with the package), or KIND:LM (untrained; "
    "mean, echo, ... docs/baselines.md)."
)


class Dtype(StrEnum):
    """Of weights and computing."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
LocalOption = Annotated[list[Path] | None, typer.Option(help="Folder of local evaluation sets (docs/evaluate.md).")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best there is.")]
MemoryOption = Annotated[int | None, typer.Option(min=1, help="Mean of so many first memory states (docs/memory.md).")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of weights and computing; auto: as the model says.")]

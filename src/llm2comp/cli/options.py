"""The app, its groups of commands, and the options that several commands share."""

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

# Groups of commands, in the order of `--help`.
MAKE, USE, JUDGE = "Make an encoder", "Use an encoder", "Judge an encoder"

MODEL_HELP = (
    "A model folder, a run, a stage of a run, a Hub id, builtin:general (comes with the package), or an untrained encoder "
    "such as mean:LM (docs/baselines.md)."
)


class Dtype(StrEnum):
    """Of weights and computing."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, metavar="MODEL")]
LocalOption = Annotated[
    list[Path] | None, typer.Option(help="Folder of your own evaluation sets (docs/evaluate.md); repeatable.", metavar="DIR")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda or mps; default: the best there is.", metavar="NAME")]
MemoryOption = Annotated[
    int | None, typer.Option(min=1, help="Use the first N memory tokens only; default: all (docs/memory.md).", metavar="N")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="Precision of weights and computing: float32, bfloat16, float16; auto: the model's own.", metavar="TYPE"),
]


def _print_version(asked: bool) -> None:
    if asked:
        from llm2comp import __version__

        print(f"llm2comp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and end.")
    ] = False,
) -> None:
    """Options of no command."""

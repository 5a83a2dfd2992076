"""The app, and the options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from llm2comp.data.sources import Loaded

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


def read_column(source: str, column: str = "text", limit: int | None = None) -> Loaded[str]:
    """Texts of a file or a Hub data set for a command with --column; says what was left out. Imports nothing heavy.

    Raises:
        DataError: cannot be read; for a column that is not there, with the option to give.
    """
    import shlex

    from llm2comp.console import say
    from llm2comp.data.columns import MissingColumnError, likely
    from llm2comp.data.sources import read_texts
    from llm2comp.recipe import TextData

    try:
        loaded = read_texts(TextData(source=source, column=column, limit=limit))
    except MissingColumnError as error:
        name = likely("column", error.names, column)
        raise error.advised(f"--column {shlex.quote(name)}" if name else None) from None
    say(loaded.summary())
    return loaded


def require_folder(folder: Path) -> None:
    """Raise RunError where there is no such folder: said before anything heavy is imported."""
    import difflib

    from llm2comp.errors import RunError

    if folder.is_dir():
        return
    parent = folder.absolute().parent
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=1)
    fix = f"did you mean {str(folder.with_name(near[0]))!r}?" if near else None
    found = "a file" if folder.exists() else None
    raise RunError("no such folder", where=str(folder), found=found, fix=fix)

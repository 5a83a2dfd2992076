"""The app, its groups of commands, and the options that several commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm2comp.errors import RunError
from llm2comp.system.console import Dtype, say

if TYPE_CHECKING:
    from llm2comp.data.loaded import Loaded

app = typer.Typer(
    help="Turn a causal language model into a text encoder by context compression (LLM2Comp).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# Groups of commands, in the order of `--help`.
MAKE, USE, JUDGE = "Make an encoder", "Use an encoder", "Judge an encoder"

MODEL_HELP = (
    "A model folder, a run, a stage of a run, a Hub id, builtin:general (comes with the package), "
    "or an untrained encoder such as mean:LM (docs/baselines.md)."
)


ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP, metavar="MODEL")]
LocalOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of your own evaluation sets (docs/evaluate.md); repeatable.", metavar="DIR"
    ),
]
ColumnOption = Annotated[str, typer.Option(help="Column that holds the text.", metavar="NAME")]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or mps; default: the best there is.", metavar="NAME")
]
MemoryOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Use the last N memory tokens only; default: all (docs/memory.md).", metavar="N"
    ),
]
TokensOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens at once, padding included; by default 1,024 on a CPU, else 16,384.",
        metavar="N",
    ),
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        help="Precision of weights and computing: float32, bfloat16, float16; auto: the "
        "model's own.",
        metavar="TYPE",
    ),
]


def _print_version(asked: bool) -> None:
    if asked:
        from llm2comp import __version__

        print(f"llm2comp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Options of `llm2comp` itself."""


def read_column(source: str, column: str = "text", limit: int | None = None) -> Loaded[str]:
    """Read texts of a file or Hub data set for a command with --column, and say what was left out.

    No heavy imports.

    Raises:
        DataError: cannot be read; for a column that is not there, with the option to give.
    """
    from llm2comp.data.sources import read_texts
    from llm2comp.recipe import TextData

    with column_advice(column):
        loaded = read_texts(TextData(source=source, column=column, limit=limit))
    say(loaded.summary())
    return loaded


@contextlib.contextmanager
def column_advice(column: str) -> Iterator[None]:
    """Say of a text column that is not there which option to give."""
    import shlex

    from llm2comp.data.columns import MissingColumnError, likely

    try:
        yield
    except MissingColumnError as error:
        if error.column != column:
            raise error.advised(None) from None
        name = likely("column", error.names, column)
        raise error.advised(f"--column {shlex.quote(name)}" if name else None) from None


def require_folder(folder: Path) -> None:
    """Raise RunError if there is no such folder, before heavy imports."""
    import difflib

    if folder.is_dir():
        return
    parent = folder.absolute().parent
    names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=1)
    fix = f"did you mean {str(folder.with_name(near[0]))!r}?" if near else None
    found = "a file" if folder.exists() else None
    raise RunError("no such folder", where=str(folder), found=found, fix=fix)


def require_model(name: str, option: str = "") -> None:
    """Raise ModelFolderError if a model's name is a path where nothing is; no heavy imports.

    `option`: what it was given by, for the message.
    """
    from llm2comp.errors import ModelFolderError
    from llm2comp.recipe import missing_path

    if ":" not in name and (nearest := missing_path(name)) is not None:
        where = f"{option} {name}".strip()
        raise ModelFolderError("no such folder", where=where, found=f"there is {nearest}")

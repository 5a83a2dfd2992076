"""The user's cache: corpora as rows of token ids, converted models, digests. Made once, by one process at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from llm2comp.errors import RunError
from llm2comp.files import explain_disk_errors

CACHE_VARIABLE = "LLM2COMP_CACHE"
Held = TypeVar("Held")


def cache_folder() -> Path:
    """Where corpora and converted models are kept."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llm2comp"


def cached(folder: Path, read: Callable[[], Held | None], build: Callable[[], Held]) -> Held:
    """What a folder of the cache holds: `read` if it is whole, else `build`, by one process at a time; others wait for it.

    Raises:
        RunError: the cache cannot be written; names the variable that moves it.
    """
    if (found := read()) is not None:
        return found
    try:
        with explain_disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                return build() if (found := read()) is None else found
    except RunError as error:
        fix = f"free space, or set {CACHE_VARIABLE} to a folder that has room and can be written, then run again"
        raise RunError(error.problem, where=error.where, fix=fix) from error


def flush(file: Path) -> None:
    """Bring a file to the disk, so that a crash of the machine leaves no hole in it."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())

"""The user's cache: corpora as token ids, converted models, digests.

One process at a time writes an entry.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from llm2comp.errors import RunError
from llm2comp.system.files import explain_disk_errors

CACHE_VARIABLE = "LLM2COMP_CACHE"
Held = TypeVar("Held")


def cache_folder() -> Path:
    """Where corpora and converted models are kept."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llm2comp"


def cached(folder: Path, read: Callable[[], Held | None], build: Callable[[], Held]) -> Held:
    """Return `read(folder)` if the cache entry is complete.

    Otherwise one process runs `build`, and others wait.

    Raises:
        RunError: the cache cannot be written; names the variable that moves it.
    """
    if (found := read()) is not None:
        return found
    try:
        with explain_disk_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                # of a process that was killed
                for leftover in folder.parent.glob(f".{folder.name}.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                return build() if (found := read()) is None else found
    except RunError as error:
        fix = (
            f"free space, or set {CACHE_VARIABLE} to a folder that has room and can be "
            "written, then run again"
        )
        raise RunError(error.problem, where=error.where, fix=fix) from error


def flush(file: Path) -> None:
    """Flush a file to disk, so that it survives a crash of the machine."""
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())

"""Safe writing: a file appears whole or not at all, and a failed write says why."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm2comp.errors import Llm2CompError, RunError

# A failed write in the words of libraries: safetensors and tokenizers, then torch.
_NATIVE = re.compile(
    r"([^:\n]+) \(os error \d+\)|inline_container\.cc|PytorchStreamWriter|iostream error"
)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step. Raises RunError on failure; the old file is then unchanged."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step. Raises RunError on failure; the old file is then unchanged."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8.

    Lone surrogates cannot: escapes in JSON, or bytes of an argument or a name that did not decode.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def open_to_others(path: Path) -> None:
    """Give a file or folder the access that the umask allows.

    Libraries write some for the owner alone.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    for place in (path, *path.rglob("*")):
        if not place.is_symlink():
            mode = 0o777 if place.is_dir() or place.stat().st_mode & 0o100 else 0o666
            place.chmod(place.stat().st_mode & 0o7000 | mode & ~mask)


@contextlib.contextmanager
def whole_or_gone(path: Path) -> Iterator[None]:
    """Remove a folder again if filling it fails. Raises RunError if it cannot be written."""
    with explain_disk_errors(path):
        try:
            yield
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a RunError that names the place.

    Other errors pass.
    """
    try:
        yield
    except Exception as error:
        reason = _failed_write(error)
        if reason is None:
            raise
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        fix = "a file stands in the way: move it or" if in_the_way else "free space or"
        raise RunError(
            f"cannot write: {reason}",
            where=str(path),
            fix=f"{fix} choose another place, then run again",
        ) from error


def _failed_write(error: Exception) -> str | None:
    """Why a write failed, or None for an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    told = None if isinstance(error, Llm2CompError) else _NATIVE.search(str(error))
    return told and (told[1] or "not all of it could be written, as on a full disk").strip()


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` for everything we write. NaN and infinity become null, as JSON has neither."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value

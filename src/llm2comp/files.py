"""Writing so that a reader, a kill or a full disk never meets half a file or half a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm2comp.errors import Llm2CompError, RunError

# How a failed write speaks in libraries that write by themselves: safetensors and tokenizers, then torch.
_NATIVE = re.compile(r"([^:\n]+) \(os error \d+\)|inline_container\.cc|PytorchStreamWriter|iostream error")


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step. Raises RunError when it cannot be written; what stood there stays."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step. Raises RunError when it cannot be written; what stood there stays."""
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


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; on leaving without error it takes the place of `path`, otherwise nothing changes there."""
    with explain_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of that name is there")
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        old = temporary.with_name(temporary.name + ".old")
        try:
            yield temporary
            temporary.chmod(0o755)
            _take_place(temporary, path, old)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def _take_place(new: Path, path: Path, old: Path) -> None:
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise


@contextlib.contextmanager
def whole_or_gone(path: Path) -> Iterator[None]:
    """For a folder that others fill in place: an error inside removes it. Raises RunError when it cannot be written."""
    with explain_disk_errors(path):
        try:
            yield
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise


@contextlib.contextmanager
def explain_disk_errors(path: Path) -> Iterator[None]:
    """Turn a failed write (full disk, no permission) into a RunError that names the place; other errors pass."""
    try:
        yield
    except Exception as error:
        reason = _failed_write(error)
        if reason is None:
            raise
        raise RunError(
            f"cannot write: {reason}", where=str(path), fix="free space or choose another place, then run again"
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
    """`json.dumps` for all that we write; what is not finite becomes null, as JSON has no NaN: there is no such figure."""
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

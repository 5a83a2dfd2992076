"""Names that may be local paths: made absolute, told from Hub ids, found in a moved run."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def absolute(name: str) -> str:
    """The absolute path if the name exists here or can only be a path; any other name unchanged.

    `~` is expanded. Applying this twice changes nothing.
    """
    path = expanded(name)
    return str(path.absolute()) if _exists(path) and name or _only_a_path(name) else name


def expanded(name: str | Path) -> Path:
    """A path with `~` expanded, if there is such a home."""
    return Path(os.path.expanduser(name))  # noqa: PTH111  # Path.expanduser raises where there is none


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for any file
        return False


# A name in a recipe that may be a local path.
LocalName = Annotated[str, AfterValidator(absolute)]


def is_local(name: str) -> bool:
    """Whether a name is an existing file or folder here."""
    return Path(name).is_absolute()


def missing_path(name: str) -> str | None:
    """The nearest existing folder if a missing name looks like a path, else None.

    A name looks like one if it cannot be a Hub id, or lies below a folder that is here
    (`runs/dmeo`).
    """
    path = expanded(name)
    if _exists(path) or not (_only_a_path(name) or path.parent.name and path.parent.is_dir()):
        return None
    path = path.absolute()
    folder = next(parent for parent in path.parents if parent.is_dir())
    beside = [child.name for child in folder.iterdir() if child.is_dir()]
    below = path.relative_to(folder).parts[0]
    return str(folder / next(iter(difflib.get_close_matches(below, beside, n=1, cutoff=0.5)), ""))


def _only_a_path(name: str) -> bool:
    """Whether a name can be neither a Hub id nor `builtin:...`."""
    return name.startswith((".", "~", os.sep)) or (
        os.sep in name and ":" not in name and not _HUB_ID.fullmatch(name)
    )


def each_path(tree: Any, change: Callable[[str], str]) -> Any:
    """Settings with `change` applied to every name that may be a path (models, data, sets)."""
    if isinstance(tree, list | tuple):
        return [each_path(item, change) for item in tree]
    if not isinstance(tree, dict):
        return tree
    changed = {key: each_path(value, change) for key, value in tree.items()}
    for key, value in tree.items():
        if key in ("source", "start_from") and value is not None:
            changed[key] = change(value)
        elif key == "tasks":
            changed[key] = [change(item) for item in value]
        elif key in ("model", "teacher", "guide") and isinstance(value, dict):
            changed[key] = {**changed[key], "name": change(value["name"])}
    return changed


def moved(name: str, old: Path, new: Path) -> str:
    """A path in a run that moved from `old` to `new`.

    The same file relative to the run if it exists, else the old path.
    """
    if not is_local(name) or old == new:
        return name
    beside = Path(os.path.normpath(new / os.path.relpath(name, old)))
    return str(beside) if _exists(beside) else name

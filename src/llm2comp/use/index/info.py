"""`index.json`: what the vectors of an index are of. Light: a command reads it before torch."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from llm2comp.errors import RunError
from llm2comp.recipe import expanded
from llm2comp.system.files import to_json, write_text

INFO_FILE = "index.json"
FORMAT_VERSION = 1
_UNKNOWN = "unknown"  # revision of a Hub model that no commit is known of


@dataclass(frozen=True)
class Info:
    """An index: whose vectors, what passages.

    Args:
        model: what names the encoder, as `llm2comp.load` takes it.
        name, revision: its identity; the vectors of two revisions are never mixed.
        dimensions: of a vector.
        passage_tokens, overlap: how documents were cut.
        nprobes, recall: of the approximate index, where there is one: partitions searched, and the
            share of the exact ten nearest that it then finds.
    """

    model: str
    name: str
    revision: str
    dimensions: int
    passage_tokens: int
    overlap: int
    nprobes: int | None = None
    recall: float | None = None
    format_version: int = FORMAT_VERSION

    @property
    def table(self) -> str:
        """The table that holds the vectors of this model."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"passages-{self.name}-{self.revision}")

    def same_model(self, name: str, revision: str) -> bool:
        """Whether vectors of that model may stand beside these."""
        return revision == self.revision and (revision != _UNKNOWN or name == self.name)


def read_info(db: Path) -> Info | None:
    """What an index is of; None where there is none yet.

    Raises:
        RunError: of another version of this package, or damaged.
    """
    file = db / INFO_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if (found := tree["format_version"]) != FORMAT_VERSION:
            raise RunError(
                "an index of another version",
                where=str(db),
                expected=f"format {FORMAT_VERSION}",
                found=found,
                fix="index the documents into a new folder",
            )
        return Info(**tree)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "remove the folder and index the documents again"
        raise RunError(f"is damaged: {error}", where=str(file), fix=fix) from None


def require_info(db: Path) -> Info:
    """As `read_info`, of a path that may begin with `~`. Raises RunError where there is none."""
    db = expanded(db)
    info = read_info(db)
    if info is None:
        found = "an empty or foreign folder" if db.is_dir() else "nothing"
        fix = f"llm2comp index FOLDER --db {db}"
        raise RunError("no index", where=str(db), found=found, fix=fix)
    return info


def write_info(db: Path, info: Info) -> None:
    """Write `index.json` in one step: from then on this is the index."""
    write_text(db / INFO_FILE, to_json(asdict(info), indent=1))


def absolute(path: str | Path) -> Path:
    """By what an index knows a file; links stay as they are."""
    return Path(os.path.normpath(expanded(path).absolute()))


def place_of(model: str | Path) -> str:
    """What names a model, from any working folder."""
    path = expanded(model)
    return str(path.absolute()) if path.exists() else str(model)

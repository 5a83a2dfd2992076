"""Whose folder is it: what we write replaces what we wrote, and never files of others.

Every folder that we write holds a mark, `.llm2comp.json`. The mark says which kind of folder it is,
and lists its files if the folder was written in one step. A folder is replaced only if it has the
mark of the same kind and no other files. A folder that is filled step by step is used only if it
has the mark, or if none of the names to be written is taken.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from llm2comp.errors import RunError
from llm2comp.system.files import explain_disk_errors, open_to_others, to_json, write_text

MARK_FILE = ".llm2comp.json"
_OUR_HIDDEN = (MARK_FILE, ".lock")
# And what systems put into folders by themselves.
_NOBODYS = (*_OUR_HIDDEN, ".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Kind:
    """A kind of folder that a command writes.

    Args:
        name: what messages call it.
        writes: patterns of the paths below it that the command writes; a `*` stands for any part,
            over / too.
        older: files that identify a folder written before marks existed.
    """

    name: str
    writes: tuple[str, ...] = ("*",)
    older: tuple[str, ...] = ()


_IN_STAGE = (
    "config.json metrics.jsonl watch.jsonl done.json memory.safetensors alignment.safetensors"
)
_IN_GRAPH = "llm2comp.json openvino_model.xml openvino_model.bin model.onnx model.onnx.data"
_IN_MODEL = """
    README.md golden.json done.json modules.json config.json generation_config.json
    config_sentence_transformers.json sentence_*_config.json
    model*.safetensors model.safetensors.index.json model.gguf
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json
    [0-9]_*/*config.json [0-9]_*/*.safetensors
"""
GRAPH = Kind("a compiled graph", tuple(_IN_GRAPH.split()), ("llm2comp.json",))
EXPORTED = Kind(
    "an exported model",
    (
        *_IN_MODEL.split(),
        *(f"{backend}/{name}" for backend in ("openvino", "onnx") for name in _IN_GRAPH.split()),
    ),
    ("golden.json", "modules.json"),
)
STAGE = Kind(
    "a stage of a run",
    (*_IN_STAGE.split(), "adapter/*", "best/*", "checkpoint-*", "runs/*", ".*.part"),
    ("config.json",),
)
START = Kind("a copy of the encoder that a run starts from", ())
RUN = Kind("a run", older=("recipe.yaml", "environment.json"))
RESPONSES = Kind("a folder of responses", older=("responses.json",))
EMBEDDINGS = Kind("a folder of embeddings")
STUDY = Kind("a study", older=("study.yaml", "runs"))
INDEX = Kind("an index")
ANALYSIS = Kind(
    "an analysis", ("analysis.json", "spectrum.*", "scores.*", "memory.*"), ("analysis.json",)
)


@contextlib.contextmanager
def new_folder(path: Path, kind: Kind | None) -> Iterator[Path]:
    """Give a temporary folder to fill.

    It replaces `path` at the end; after an error `path` is unchanged.

    Args:
        path: where to.
        kind: the kind of folder. A folder of another kind, or with other files, is not replaced.
            None: do not check (the caller keeps the old files, or the place belongs to us, as the
            cache does).

    Raises:
        RunError: not to be replaced (`refuse_foreign`), or cannot be written.
    """
    with explain_disk_errors(path):
        path = path.resolve()  # what a link stands for is replaced, not the link
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a file of that name is there")
        if kind is not None:
            refuse_foreign(path, kind)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        old = temporary.with_name(temporary.name + ".old")
        try:
            yield temporary
            if kind is not None:
                write_text(temporary / MARK_FILE, to_json({kind.name: _files(temporary)}, indent=1))
            open_to_others(temporary)
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


def refuse_foreign(folder: Path, kind: Kind) -> None:
    """Raise RunError if a folder may not be replaced: no mark of this kind, or other files."""
    marked = _mark(folder, kind)
    if marked is None:
        _refuse(folder, f"a new or empty folder, or {kind.name}", _entries(folder))
    else:
        others = [
            name
            for name in _files(folder)
            if name not in marked and not _matches(name, kind.writes)
        ]
        _refuse(folder, f"{kind.name} and nothing else", others)


def remove_folder(folder: Path, kind: Kind) -> None:
    """Remove a folder of that kind, if there is one. Raises RunError as `refuse_foreign`."""
    with explain_disk_errors(folder):
        if folder.exists():
            refuse_foreign(folder, kind)
            shutil.rmtree(folder)


def refuse_taken(folder: Path, kind: Kind) -> None:
    """Raise RunError if a folder has no mark of this kind and a name to be written is taken."""
    if _mark(folder, kind) is None:
        taken = [
            name
            for name in _entries(folder)
            if not name.startswith(".") and _matches(name, kind.writes)
        ]
        _refuse(folder, f"a new or empty folder, or {kind.name}", taken)


def claim(folder: Path, kind: Kind) -> frozenset[str] | None:
    """Mark a folder that will be filled step by step.

    Returns the names that it held before; None: there was no folder. Raises RunError as
    `refuse_taken` does, or if writing fails.
    """
    refuse_taken(folder, kind)
    before = frozenset(path.name for path in folder.iterdir()) if folder.is_dir() else None
    marks = _marks(folder)
    if kind.name not in marks:
        write_text(folder / MARK_FILE, to_json(marks | {kind.name: []}, indent=1))
    return before


def unclaim(folder: Path, before: frozenset[str] | None) -> None:
    """Undo a claim: remove what is new since `claim` gave `before`, and a new folder if empty.

    Hidden names stay but our own: others, such as caches, may have come meanwhile.
    """
    with explain_disk_errors(folder):
        for path in list(folder.iterdir()):
            ours = not path.name.startswith(".") or path.name in _OUR_HIDDEN
            if ours and path.name not in (before or ()):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if before is None and not any(folder.iterdir()):
            folder.rmdir()


def refuse_output(
    file: Path, inputs: Iterable[Path] = (), ours: Callable[[Path], bool] | None = None
) -> None:
    """Raise RunError if a file may not be written: a folder, an input, or not ours (`ours`)."""
    if not file.exists():
        return
    fix = "give another --out"
    if file.is_dir():
        raise RunError(
            "a folder stands there", where=str(file), expected="a file to write", fix=fix
        )
    for given in inputs:
        if given.exists() and file.samefile(given):
            raise RunError(
                "would replace its own input",
                where=str(file),
                found=f"the same file as {given}",
                fix=fix,
            )
    if ours is not None and file.stat().st_size and not ours(file):
        found = "a file that this command did not write"
        raise RunError(
            "would replace what is not its own",
            where=str(file),
            found=found,
            fix=f"{fix}, or move it away",
        )


def _refuse(folder: Path, expected: str, foreign: list[str]) -> None:
    if foreign:
        found = ", ".join(foreign[:5]) + (
            f" and {len(foreign) - 5:,} more" if len(foreign) > 5 else ""
        )
        fix = "give another folder, or move these away"
        raise RunError(
            "would replace what is not its own",
            where=str(folder),
            expected=expected,
            found=found,
            fix=fix,
        )


def _entries(folder: Path) -> list[str]:
    """Names in a folder, without files that belong to nobody (such as .DS_Store).

    Empty if there is no folder.
    """
    return (
        sorted({path.name for path in folder.iterdir()}.difference(_NOBODYS))
        if folder.is_dir()
        else []
    )


def _files(folder: Path) -> list[str]:
    """Relative paths of all files and links below a folder, without files that belong to nobody."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [
            Path(place, name).relative_to(folder).as_posix()
            for name in (*files, *links)
            if name not in _NOBODYS
        ]
    return sorted(found)


def _marks(folder: Path) -> dict[str, list[str]]:
    """Contents of a folder's mark: kind → files. Empty if the mark is missing or damaged."""
    try:
        found = json.loads((folder / MARK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        found
        if isinstance(found, dict) and all(isinstance(files, list) for files in found.values())
        else {}
    )


def _mark(folder: Path, kind: Kind) -> list[str] | None:
    """The files that a mark of that kind lists; None without such a mark."""
    older = bool(kind.older) and all((folder / name).exists() for name in kind.older)
    return _marks(folder).get(kind.name, [] if older else None)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

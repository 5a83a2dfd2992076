"""A folder → its documents, and a report of what could not be read.

    report = Report("docs")
    for document in documents(Path("docs"), report):
        ...
    report.summary()      # docs: 14 files; left out: 1 encrypted: it asks for a password (a.pdf)

A format is a row of `READERS`. A file that cannot be read never ends the reading of a folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm2comp.data.documents import containers, texts
from llm2comp.data.documents.blocks import Block, Document
from llm2comp.data.loaded import Tally
from llm2comp.errors import DataError, one_line
from llm2comp.system.files import is_unicode

# Raises DataError, or what its parser raises.
Reader = Callable[[Path, Tally], Iterator[Block]]

_SOURCE_CODE = (
    ".c .h .cc .cpp .hpp .cs .go .java .jl .js .jsx .kt .lua .m .php .pl .r .rb .rs .scala .sh "
    ".sql .swift .ts .tsx"
)
READERS: dict[str, Reader] = {
    **dict.fromkeys((".md", ".markdown"), texts.markdown),
    **dict.fromkeys((".txt", ".text"), texts.plain),
    **dict.fromkeys((".rst",), texts.restructured),
    **dict.fromkeys((".html", ".htm", ".xhtml"), containers.html),
    **dict.fromkeys((".pdf",), containers.pdf),
    **dict.fromkeys((".docx",), containers.docx),
    **dict.fromkeys((".ipynb",), containers.notebook),
    **dict.fromkeys((".jsonl",), containers.json_lines),
    **dict.fromkeys((".py",), texts.python),
    **dict.fromkeys(_SOURCE_CODE.split(), texts.plain),
}
MOST_BYTES = 50_000_000
_NO_DOCUMENTS = ("__pycache__", "node_modules")


@dataclass
class Report(Tally):
    """What was found in a folder: `there` files, `used` ones, and why the others were left out.

    `notes`: a line for each document of which a part was left out.
    """

    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line, and those of the notes."""
        left_out = f"; left out: {self.left_out()}" if self.skipped else ""
        return "\n".join([f"{self.source}: {self.used:,} files{left_out}", *self.notes])


def documents(root: Path, report: Report) -> Iterator[Document]:
    """The documents of a folder (or one file) in the order of their paths.

    Raises DataError where there is no such folder.
    """
    for path in find_files(root, report):
        name = path.name if path == root else path.relative_to(root).as_posix()
        document = read_or_report(path, name, report)
        if document is not None:
            yield document


def find_files(root: Path, report: Report) -> list[Path]:
    """Files of known kinds below a folder, sorted; hidden ones are no documents.

    Other kinds of files, and links that lead to no file, are told in the report.

    Raises:
        DataError: no such folder, or one that may not be read.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise DataError("no such folder", where=str(root))

    def refuse(error: OSError) -> None:
        report.leave_out(f"cannot be read: {error.strerror}", _shown(Path(error.filename), root))

    found = []
    for place, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in _NO_DOCUMENTS)
        for name in folders:
            if (link := Path(place, name)).is_symlink():
                report.leave_out("links to folders are not followed", _shown(link, root))
        for path in (Path(place, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() not in READERS:
                report.leave_out(f"of a kind that is not read ({path.suffix})", _shown(path, root))
            elif not path.is_file():
                report.leave_out("no file, or a link that leads nowhere", _shown(path, root))
            elif not str(path).isprintable() and "\\udc" in ascii(str(path)):
                report.leave_out("a name that is not UTF-8: rename it", _shown(path, root))
            else:
                found.append(path)
    return sorted(found)


def read_or_report(path: Path, name: str, report: Report) -> Document | None:
    """A document; None where it cannot be read, and the report says why."""
    report.there += 1
    try:
        document = read_document(path)
    except DataError as error:
        report.leave_out(error.problem, _shown(Path(name), Path()))
        return None
    report.used += 1
    if document.left_out:
        report.notes.append(f"{name}: left out: {document.left_out}")
    return document


def read_document(path: Path) -> Document:
    """Read one file by its suffix.

    Raises:
        DataError: a kind that is not read; too large, broken, encrypted, or without text.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError("of a kind that is not read", where=str(path), expected=", ".join(READERS))
    tally, blocks = Tally(path.name), list[Block]()
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise DataError(
                f"{size / 1e6:,.0f} MB, over the limit of {MOST_BYTES / 1e6:.0f}: split it",
                where=str(path),
            )
        for block in reader(path, tally):
            if is_unicode("".join([block.text, *block.headings])):
                blocks.append(block)
            else:  # escapes of JSON may stand for halves of a character
                tally.leave_out("not Unicode", f"line {block.first}")
    except (DataError, ModuleNotFoundError):
        raise
    except Exception as error:  # each parser raises kinds of its own for a broken file
        cause = one_line(f"{type(error).__name__}: {error}", 120)
        raise DataError(f"cannot be read: {cause}", where=str(path)) from error
    if not blocks:
        left_out = f": {tally.left_out()}" if tally.skipped else ""
        raise DataError(f"no text in it{left_out}", where=str(path))
    return Document(path, tuple(blocks), tally.left_out())


def _shown(path: Path, root: Path) -> str:
    """A path below a folder for a message of one line: what cannot be printed is escaped."""
    name = os.path.relpath(path, root)
    return name if name.isprintable() else ascii(name)[1:-1]

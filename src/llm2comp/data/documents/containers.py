"""Files whose text lies in a container → blocks: HTML, PDF, .docx, notebooks, JSON lines.

The libraries are of the extra `search`, and imported for a file of the kind alone.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2comp.data.columns import suitable, usual
from llm2comp.data.documents.blocks import Block, placed, under
from llm2comp.data.documents.texts import lines_of, markdown_blocks
from llm2comp.data.loaded import Tally
from llm2comp.data.tables import Row, file_rows
from llm2comp.errors import DataError

if TYPE_CHECKING:
    from docx.table import Table
    from docx.text.paragraph import Paragraph

# A .docx that unpacks to more is refused: its parser would need many times that memory.
UNPACKED_BYTES = 500_000_000
_TITLES = ("title", "question", "query", "heading", "name")
# What stands around paragraphs, rows, cells or runs of a .docx, where python-docx looks for none:
# tracked changes, content controls, fields, custom XML, directions of writing, and the newer of
# two forms of a drawing.
_AROUND = ("ins", "moveTo", "sdt", "sdtContent", "fldSimple", "smartTag", "customXml", "dir", "bdo")
_COMPATIBILITY = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"


def html(path: Path, _: Tally) -> Iterator[Block]:
    """The main text of a web page; a line is where a block begins in the file."""
    import lxml.html
    import trafilatura

    raw = path.read_bytes()
    if b"\0" in raw:
        raise DataError("no web page: NUL bytes", where=str(path))
    if not raw.strip():
        return iter(())
    # None for a page of a few words, of which all is taken
    text = trafilatura.extract(
        raw, output_format="markdown", favor_recall=True, include_comments=False
    ) or trafilatura.html2txt(lxml.html.document_fromstring(raw))
    return placed(markdown_blocks(text.splitlines()), raw.decode("utf-8", "replace"))


def pdf(path: Path, tally: Tally) -> Iterator[Block]:
    """The pages of a PDF; those without text are told.

    Raises:
        DataError: encrypted; no text in it.
    """
    import pypdfium2

    try:
        file = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        reason = "encrypted: it asks for a password" if "assword" in str(error) else "a broken PDF"
        raise DataError(reason, where=str(path)) from None
    with file:
        # U+FFFE is the hyphen of a word that goes on in the next line
        texts = [
            re.sub("\ufffe\\s*|\r", "", page.get_textpage().get_text_bounded()).strip()
            for page in file
        ]
    if not any(texts):
        raise DataError(
            f"no text in its {len(texts):,} pages, as in scans: recognise it first (ocrmypdf)",
            where=str(path),
        )
    for number, text in enumerate(texts, 1):
        if text:
            yield Block(text, (f"page {number}",), number, number)
        else:
            tally.leave_out("without text, blank or scanned", f"page {number}")


def docx(path: Path, _: Tally) -> Iterator[Block]:
    """Paragraphs and tables of a Word document, counted from 1, with all its changes accepted.

    Text boxes and notes are read with the paragraph that they belong to; headers and footers, which
    every page repeats, are not.
    """
    from docx import Document
    from docx.oxml import parse_xml
    from docx.table import Table

    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > UNPACKED_BYTES:
            raise DataError("unpacks to more than 500 MB", where=str(path))
    document, headings = Document(str(path)), dict[int, str]()
    notes = dict[tuple[str, str], str]()
    for relation in document.part.rels.values():
        kind = relation.reltype.rpartition("/")[2]
        if kind in ("footnotes", "endnotes") and not relation.is_external:
            for note in _bare(parse_xml(relation.target_part.blob)):
                notes[f"{kind[:-1]}Reference", note.get(_w("id"))] = _paragraphs(note)
    _bare(document.element.body)
    for number, item in enumerate(document.iter_inner_content(), 1):
        text = _with_notes(item, notes)
        if not isinstance(item, Table):
            style = (item.style.name or "") if item.style is not None else ""
            heading = re.fullmatch(r"(Heading|Title) ?(\d?)", style)
            if heading and item.text.strip():
                level = int(heading[2] or heading[1] == "Heading")  # the title is above all of them
                headings = under(headings, level, item.text)
                text = text.removeprefix(item.text).lstrip()
            elif style.lower().startswith("toc "):  # the table of contents says headings twice
                continue
        if text.strip():
            yield Block(text, tuple(headings.values()), number, number)


def _w(name: str) -> str:
    return f"{{http://schemas.openxmlformats.org/wordprocessingml/2006/main}}{name}"


def _bare(element: Any) -> Any:
    """The same element of a .docx, without what stands around its text."""
    from lxml.etree import strip_elements, strip_tags

    strip_elements(element, f"{_COMPATIBILITY}Fallback", with_tail=False)
    around = (f"{_COMPATIBILITY}{name}" for name in ("AlternateContent", "Choice"))
    strip_tags(element, *map(_w, _AROUND), *around)
    return element


def _paragraphs(element: Any) -> str:
    from docx.text.paragraph import Paragraph

    return "\n".join(Paragraph(p, element).text.strip() for p in element.iter(_w("p"))).strip()


def _with_notes(item: Paragraph | Table, notes: Mapping[tuple[str, str], str]) -> str:
    """A paragraph, its text boxes and notes; or the rows of a table, with all of this."""
    from docx.table import Table, _Cell

    if isinstance(item, Table):
        return "\n".join(
            " | ".join(
                "\n".join(
                    _with_notes(inner, notes) for inner in _Cell(tc, item).iter_inner_content()
                ).strip()
                for tc in row.tc_lst  # `row.cells` has merged ones several times
            )
            for row in item._tbl.tr_lst
        )
    boxes = [_paragraphs(box) for box in item._p.iter(_w("txbxContent"))]
    marks = item._p.iter(_w("footnoteReference"), _w("endnoteReference"))
    told = [notes.get((mark.tag.rpartition("}")[2], mark.get(_w("id"))), "") for mark in marks]
    return "\n".join([item.text, *filter(None, [*boxes, *told])])


def notebook(path: Path, _: Tally) -> Iterator[Block]:
    """Cells of a Jupyter notebook: its Markdown, and its code as fenced blocks; no output."""
    source = "\n".join(lines_of(path))
    lines = list[str]()
    for cell in json.loads(source)["cells"]:
        text = "".join(cell["source"])
        if text.strip():
            text = text if cell["cell_type"] == "markdown" else f"~~~~\n{text}\n~~~~"
            lines += [*text.splitlines(), ""]
    return placed(markdown_blocks(lines), source)


def json_lines(path: Path, tally: Tally) -> Iterator[Block]:
    """A block for each row: its text, under its title or question where it has one.

    The text is the column of a usual name, else that of the file's longest strings, else the title.
    Columns that are not read are told.
    """
    lengths = Counter[str]()
    for _, row in file_rows(path, ()):
        lengths.update({name: len(value) for name, value in _texts(row).items()})
    names = suitable(name for name in lengths if name not in _TITLES) or suitable(lengths)
    names = names or list(lengths)
    chosen = usual("column", names) or max(names, key=lengths.__getitem__, default=None)
    read = set[str]()
    for number, (place, row) in enumerate(file_rows(path, ()), 1):
        texts = _texts(row)
        others = [name for name in texts if name not in _TITLES]
        found = (name for name in (chosen, *_TITLES) if name in texts)
        column = usual("column", others) or next(found, None)
        if column is None:
            tally.leave_out(row if isinstance(row, str) else "without a text", place)
            continue
        title = next((name for name in _TITLES if name in texts and name != column), None)
        read |= {column, title or column}
        line = int(place.split()[-1]) if place.startswith("line") else number
        headings = under({}, 1, texts[title]) if title else {}
        yield Block(texts[column], tuple(headings.values()), line, line)
    reason = f"of its columns, apart from {', '.join(map(repr, sorted(read)))}"
    for name in suitable(lengths):
        if name not in read:
            tally.leave_out(reason, repr(name))


def _texts(row: Row | str) -> dict[str, str]:
    """The columns of a row that hold a text."""
    items = {}.items() if isinstance(row, str) else row.items()
    return {name: value for name, value in items if isinstance(value, str) and value.strip()}

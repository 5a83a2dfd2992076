"""Files of each format → blocks with headings and lines; passages by tokens; what cannot be read is
told and the rest goes on.
"""

import json
import os
import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import llm2comp
from document_files import pdf_bytes, write_all
from llm2comp.data.documents import (
    READERS,
    Block,
    Document,
    Report,
    documents,
    passages,
    read_document,
)
from llm2comp.errors import DataError

pytest.importorskip("pypdfium2", reason="needs the extra search")
TINY = Path(llm2comp.__file__).parent / "assets/tiny/tokenizer.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("documents") / "docs")


@pytest.fixture(scope="module")
def found(folder):
    report = Report("docs")
    return {d.path.name: d for d in documents(folder, report)}, report


def words(block):
    return " ".join(re.findall(r"\w+", block.text))


# Blocks of each file: words, headings, first and last line.
EXPECTED = {
    "a.md": [
        ("Opening words They go on", ("Guide",), 6, 7),
        ("first step second step", ("Guide", "Install"), 11, 12),
        ("sh no heading", ("Guide", "Install"), 14, 16),
        ("Last words", ("Guide", "Use"), 20, 20),
    ],
    "b.txt": [("Opening words More", (), 1, 2), ("Last words", (), 4, 4)],
    "c.rst": [
        ("Opening words", ("Guide",), 5, 5),
        ("First step", ("Guide", "Install"), 10, 10),
        ("A detail", ("Guide", "Install", "Details"), 15, 15),
        ("Last words", ("Guide", "Use"), 20, 20),
    ],
    "d.html": [
        (
            "Opening words of a page that says enough to be taken for one with a content of its "
            "own",
            ("Guide",),
            5,
            5,
        ),
        (
            "First step of the installation told in a sentence that a reader can follow at ease",
            ("Guide", "Install"),
            7,
            7,
        ),
    ],
    "e.pdf": [
        ("Opening words More", ("page 1",), 1, 1),
        ("Last words", ("page 2",), 2, 2),
    ],
    "f.docx": [
        ("Opening words", ("Guide",), 2, 2),
        ("step one", ("Guide", "Install"), 4, 4),
    ],
    "h.jsonl": [("Opening words", ("Guide",), 1, 1), ("Last words", (), 3, 3)],
    "i.py": [
        ("Module words", ("i",), 1, 1),
        ("Keeps things And finds them", ("i", "Store"), 5, 7),
        ("Return what was kept", ("i", "Store", "find"), 11, 11),
    ],
    "j.js": [("Opening words f", (), 1, 2), ("Last words", (), 4, 4)],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_of_each_format(found, name):
    blocks = [(words(b), b.headings, b.first, b.last) for b in found[0][name].blocks]
    assert blocks == EXPECTED[name]


def test_notebook(found, folder):
    text, code = found[0]["g.ipynb"].blocks
    assert (words(text), text.headings) == ("Opening words More", ("Guide",))
    assert (words(code), code.headings) == ("answer 42", ("Guide",))
    lines = (folder / "g.ipynb").read_text().splitlines()
    assert "Opening words" in lines[text.first - 1]
    assert "answer = 42" in lines[code.first - 1]


def test_docx_with_tracked_changes_and_content_controls(tmp_path):
    """What was inserted or moved here is read, what was deleted or moved away is not."""
    import docx
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    def run(text):
        return f'<w:r><w:t xml:space="preserve">{text}</w:t></w:r>'

    def within(name, inner):
        return f"<w:{name}>{inner}</w:{name}>"

    def control(inner):
        return within("sdt", "<w:sdtPr><w:tag w:val='x'/></w:sdtPr>" + within("sdtContent", inner))

    deleted = within("del", "<w:r><w:delText>gone</w:delText></w:r>")
    cell = within("tc", within("p", run("cell")))
    contents = '<w:pPr><w:pStyle w:val="TOCHeading"/></w:pPr>' + run("Contents")
    parts = [
        within("p", run("a ") + within("ins", run("b ") + within("smartTag", run("c"))) + deleted),
        within("p", within("moveFrom", run("gone")) + within("moveTo", run("d"))),
        control(within("p", contents) + control(within("p", run("e ") + control(run("f"))))),
        control(within("tbl", "<w:tblPr/><w:tblGrid/>" + control(within("tr", control(cell))))),
        within("p", run("see ") + within("fldSimple", run("1"))),
    ]
    document = docx.Document()
    for child in parse_xml(f"<w:x {nsdecls('w')}>{''.join(parts)}</w:x>"):
        document.element.body.insert_element_before(child, "w:sectPr")
    document.save(str(tmp_path / "a.docx"))
    blocks = read_document(tmp_path / "a.docx").blocks
    assert [(b.text, b.first) for b in blocks] == [
        ("a b c", 1),
        ("d", 2),
        ("e f", 4),
        ("cell", 5),
        ("see 1", 6),
    ]


def test_docx_with_notes_text_boxes_and_a_table_in_a_table(tmp_path):
    """Each is read once, behind the paragraph it belongs to; the older form of a box is not."""
    import docx
    from docx.opc.packuri import PackURI
    from docx.opc.part import Part
    from docx.oxml import parse_xml

    spaces = (
        'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main" '
        'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
    )

    def paragraph(*inner):
        return f"<w:p>{''.join(inner)}</w:p>"

    def run(text):
        return f"<w:r><w:t>{text}</w:t></w:r>"

    def box(text):
        return f"<w:txbxContent>{paragraph(run(text))}</w:txbxContent>"

    drawing = (
        f"<w:r><mc:AlternateContent><mc:Choice Requires='wps'><w:drawing>{box('boxed')}</w:drawing>"
        f"</mc:Choice><mc:Fallback><w:pict>{box('boxed')}</w:pict></mc:Fallback>"
        "</mc:AlternateContent></w:r>"
    )
    marks = "<w:r><w:footnoteReference w:id='2'/></w:r><w:r><w:endnoteReference w:id='2'/></w:r>"
    document = docx.Document()
    for kind, text in (("footnotes", "below"), ("endnotes", "behind")):
        note = f"<w:{kind[:-1]} w:id='2'>{paragraph(run(text))}</w:{kind[:-1]}>"
        rule = f"<w:{kind[:-1]} w:id='0'>{paragraph(run('rule'))}</w:{kind[:-1]}>"
        xml = f"<w:{kind} {spaces}>{rule}{note}</w:{kind}>".encode()
        part = Part(PackURI(f"/word/{kind}.xml"), "application/xml", xml, document.part.package)
        base = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
        document.part.relate_to(part, f"{base}/{kind}")
    body = paragraph(run("before "), drawing, run("after"), marks)
    for child in parse_xml(f"<w:x {spaces}>{body}</w:x>"):
        document.element.body.insert_element_before(child, "w:sectPr")
    document.add_heading("Report", 0)
    document.add_heading("Plain", 1)
    outer = document.add_table(1, 2)
    outer.cell(0, 0).text = "left"
    inner = outer.cell(0, 1).add_table(1, 2)
    inner.cell(0, 0).text, inner.cell(0, 1).text = "in", "side"
    document.sections[0].header.paragraphs[0].text = "on every page"
    document.save(str(tmp_path / "a.docx"))
    assert [(b.text, b.headings, b.first) for b in read_document(tmp_path / "a.docx").blocks] == [
        ("before after\nboxed\nbelow\nbehind", (), 1),
        ("left | in | side", ("Report", "Plain"), 4),
    ]


def test_docx_heading_with_a_note_and_a_text_box(tmp_path):
    """They are text below the heading, not words of it."""
    import docx
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    document = docx.Document()
    heading = document.add_heading("Guide", 1)
    box = "<w:txbxContent><w:p><w:r><w:t>boxed</w:t></w:r></w:p></w:txbxContent>"
    heading._p.append(parse_xml(f"<w:r {nsdecls('w')}><w:pict>{box}</w:pict></w:r>"))
    document.add_paragraph("Words.")
    document.save(str(tmp_path / "a.docx"))
    blocks = read_document(tmp_path / "a.docx").blocks
    assert [(b.text, b.headings, b.first) for b in blocks] == [
        ("boxed", ("Guide",), 1),
        ("Words.", ("Guide",), 2),
    ]


def test_docx_merged_cells_are_read_once(tmp_path):
    """A cell that says it goes on one above it, where there is none, ends no document."""
    import docx
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    document = docx.Document()
    table = document.add_table(3, 3)
    table.cell(0, 0).merge(table.cell(0, 2)).text = "wide"
    table.cell(1, 0).merge(table.cell(2, 0)).text = "tall"
    table.cell(1, 1).text, table.cell(2, 1).text = "one", "two"
    table.cell(0, 0)._tc.get_or_add_tcPr().append(parse_xml(f"<w:vMerge {nsdecls('w')}/>"))
    document.save(str(tmp_path / "a.docx"))
    (block,) = read_document(tmp_path / "a.docx").blocks
    assert words(block) == "wide tall one two"


@pytest.mark.parametrize("kind", ["md", "docx"])
def test_levels_that_are_left_out(tmp_path, kind):
    """A heading ends all of its level and below, wherever the levels of a document begin."""
    import docx

    path, lines = tmp_path / f"a.{kind}", "## One,a,#### Deep,b,## Two,c,# Top,d,### Under,e"
    path.write_text(lines.replace(",", "\n\n"))
    if kind == "docx":
        document = docx.Document()
        for line in lines.split(","):
            marks, _, title = line.rpartition(" ")
            document.add_paragraph(title, f"Heading {len(marks)}" if marks else None)
        document.save(str(path))
    assert {b.text: b.headings for b in read_document(path).blocks} == {
        "a": ("One",),
        "b": ("One", "Deep"),
        "c": ("Two",),
        "d": ("Top",),
        "e": ("Top", "Under"),
    }


def test_pages_of_a_pdf_without_text_are_told_in_a_line(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf_bytes("words", *[""] * 7, "more"))
    report = Report("docs")
    (document,) = documents(tmp_path, report)
    assert [block.first for block in document.blocks] == [1, 9]
    assert report.notes == [
        "a.pdf: left out: 7 without text, blank or scanned "
        "(page 2, page 3, page 4, page 5, page 6, ...)"
    ]


def test_text_of_rows_is_one_column_and_the_others_are_told(tmp_path):
    """Without a usual name it is the column with the longest strings, in all rows of a file."""
    article = "A long article about the rose, its water and its light."

    def read(*rows):
        (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        document = read_document(tmp_path / "a.jsonl")
        return [(b.text, b.headings, b.first) for b in document.blocks], document.left_out

    rows = [
        {"id": "a" * 99, "author": "Smith", "article": article},
        {"author": "A name that is longer than the text", "title": "Roses", "article": "Short."},
        {"author": "Jones", "article": ""},
        {"author": "Jones", "title": "Thorns"},
    ]
    blocks = [(article, (), 1), ("Short.", ("Roses",), 2), ("Thorns", (), 4)]
    left_out = (
        "1 without a text (line 3), 1 of its columns, apart from 'article', 'title' ('author')"
    )
    assert read(*rows) == (blocks, left_out)
    usual = [{"text": "Short.", "comment": article}, {"text": "", "comment": article}]
    left_out = "1 without a text (line 2), 1 of its columns, apart from 'text' ('comment')"
    assert read(*usual) == ([("Short.", (), 1)], left_out)
    assert read({"id": "a" * 99, "title": "Roses"}) == ([("Roses", (), 1)], "")
    assert read({"url": "roses.org"}) == ([("roses.org", (), 1)], "")


def test_texts_that_are_not_unicode_are_left_out(tmp_path):
    """JSON's escapes can write half of a character; a tokenizer takes none."""
    (tmp_path / "a.jsonl").write_text(
        '{"text": "\\ud83d half"}\n{"text": "\\ud83d\\ude00 whole"}\n'
        '{"title": "\\udc00", "text": "b"}\n'
    )
    document = read_document(tmp_path / "a.jsonl")
    assert [(b.text, b.first) for b in document.blocks] == [("😀 whole", 2)]
    assert document.left_out == "2 not Unicode (line 1, line 3)"


def test_a_rule_at_the_beginning_is_no_front_matter(tmp_path):
    """Front matter is a YAML mapping, and in Markdown files alone."""

    def read(name, text):
        (tmp_path / name).write_text(text)
        found = read_document(tmp_path / name)
        return [(b.text, b.headings, b.first) for b in found.blocks]

    text = "\n\nIntroduction.\n\n---\n\nLast words.\n"
    parts = [("Introduction.", (), 3), ("Last words.", (), 7)]
    assert read("rule.md", f"---{text}") == parts
    assert read("slides.md", "---\n# One\n---\nwords\n") == [("words", ("One",), 4)]
    assert read("list.md", "---\n- one\n- two: [\n\n---\n")[0][0] == "- one\n- two: ["
    assert read("matter.md", f"---\ndate: 2024-02-31\ntags: [a, b]\n---{text}") == [
        ("Introduction.", (), 6),
        ("Last words.", (), 10),
    ]
    cell = {"cell_type": "markdown", "metadata": {}, "source": ["---\n\nNote: words\n\n---\n"]}
    assert read("a.ipynb", json.dumps({"cells": [cell]}))[0][0] == "Note: words"


def test_report(found, folder):
    documents_found, report = found
    assert sorted(documents_found) == sorted(p.name for p in folder.iterdir())
    assert {p.suffix for p in folder.iterdir()} <= set(READERS)
    assert report.summary() == ("docs: 10 files\nh.jsonl: left out: 1 without a text (line 2)")
    assert found[0]["a.md"].title == "Guide"
    assert found[0]["b.txt"].title == "b"


def test_what_cannot_be_read_is_told_and_the_rest_goes_on(tmp_path):
    (tmp_path / "good.md").write_text("# A\n\nwords\n")
    (tmp_path / "with\nnewline.md").write_text("words of a strange name\n")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4 and nothing")
    (tmp_path / "locked.pdf").write_bytes(pdf_bytes("words", encrypted=True))
    (tmp_path / "scan.pdf").write_bytes(pdf_bytes("", ""))
    (tmp_path / "broken.docx").write_bytes(b"PK no archive")
    (tmp_path / "broken.ipynb").write_text("{")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "deep.py").write_text("x = " + "(" * 5000)
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    (tmp_path / "binary.txt").write_bytes(b"a\0b")
    (tmp_path / "binary.html").write_bytes(b"\x93\0\xff")
    (tmp_path / "empty.md").write_text("\n \n")
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nno json\n')
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(100_000_000)
    (tmp_path / "picture.png").write_bytes(b"png")
    (tmp_path / ".hidden.md").write_text("hidden")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dead.md").symlink_to(tmp_path / "nothing.md")
    with open(os.fsencode(tmp_path) + b"/\xff.md", "wb") as file:  # noqa: PTH123
        file.write(b"words")
    report = Report("docs")
    read = list(documents(tmp_path, report))
    assert sorted(d.path.name for d in read) == ["good.md", "with\nnewline.md"]
    assert "\n" not in report.summary()
    for part in (
        "docs: 2 files; left out: ",
        "a broken PDF (broken.pdf)",
        "encrypted: it asks for a password (locked.pdf)",
        "no text in its 2 pages, as in scans: recognise it first (ocrmypdf) (scan.pdf)",
        "BadZipFile: File is not a zip file (broken.docx)",
        "JSONDecodeError",
        "SyntaxError",
        "not UTF-8 (line 1) (latin.txt)",
        "not a text file in UTF-8: NUL bytes (binary.txt)",
        "no web page: NUL bytes (binary.html)",
        "no text in it (empty.md)",
        "no text in it: 1 without a text (line 1), 1 malformed JSON (line 2) (rows.jsonl)",
        "100 MB, over the limit of 50: split it (huge.txt)",
        "of a kind that is not read (.png) (picture.png)",
        "links to folders are not followed (loop)",
        "a link that leads nowhere (dead.md)",
        r"a name that is not UTF-8: rename it (\udcff.md)",
    ):
        assert part in report.summary(), part
    assert "hidden" not in report.summary()


def test_single_file_and_missing_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        list(documents(tmp_path / "no", Report("no")))
    (tmp_path / "a.md").write_text("words")
    assert [d.path.name for d in documents(tmp_path / "a.md", Report("a"))] == ["a.md"]
    with pytest.raises(DataError, match="of a kind that is not read"):
        read_document(tmp_path / "a.xyz")
    (tmp_path / "rows.jsonl").write_text('{"text": "words"}\n{"n": 1}\n')
    (tmp_path / "empty.md").write_text("\n")
    for name, told in (
        ("rows.jsonl", "x: 1 files\nrows.jsonl: left out: 1 without a text (line 2)"),
        ("empty.md", "x: 0 files; left out: 1 no text in it (empty.md)"),
    ):
        report = Report("x")
        list(documents(tmp_path / name, report))
        assert report.summary() == told


# ---- passages


def by_word(text):
    """A token for each word or mark."""
    return [match.span() for match in re.finditer(r"\w+|[^\w\s]", text)]


def made(seed):
    """A document of random paragraphs: each its lines as in a file, no two words alike."""
    draw = random.Random(seed)
    number, line, blocks = 0, 1, []
    for _ in range(30):
        text = ""
        for _ in range(draw.randint(1, 6)):
            for _ in range(draw.randint(1, 20)):
                text += f"w{number}{draw.choice(['', '', '', '.'])} "
                number += 1
            text = text.rstrip() + "\n"
        headings = (f"part {len(blocks) // 7}",)
        lines = text.count("\n")
        blocks.append(Block(text.rstrip("\n"), headings, line, line + lines - 1))
        line += lines + 1
    return Document("x", tuple(blocks)), number


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("size", "overlap"), [(2, 0), (7, 3), (64, 16), (10_000, 32)])
def test_passages_cover_the_document(seed, size, overlap):
    """None is over the size or a heading, every word is in one, lines are those of its words, and
    neighbours overlap by about what was asked for.
    """
    document, count = made(seed)
    line_of = {
        word: block.first + place
        for block in document.blocks
        for place, line in enumerate(block.text.split("\n"))
        for word in re.findall(r"\w+", line)
    }
    cut = passages(document, by_word, size, overlap)
    assert len(cut) >= len(document.sections)
    seen = []
    for passage in cut:
        inside = re.findall(r"\w+", passage.text)
        assert len(by_word(passage.text)) <= size
        if not inside:  # a full stop
            continue
        assert (line_of[inside[0]], line_of[inside[-1]]) == (passage.first, passage.last)
        seen += [int(word[1:]) for word in inside]
    assert sorted(set(seen)) == list(range(count))
    repeated = len(seen) - count
    # of a section the passages after the first repeat what was asked for at most
    assert repeated <= overlap * (len(cut) - len(document.sections))
    if (size, overlap) == (64, 16):
        assert repeated >= 8 * (len(cut) - len(document.sections)) > 0


def test_passages_end_with_sentences_where_they_can():
    text = "One two three four. Five six seven eight. Nine ten eleven twelve."
    document = Document("x", (Block(text, ("Title",), 3, 3),))
    first, *_ = passages(document, by_word, 11, 0)
    assert first.text == "One two three four. Five six seven eight."
    assert first.in_context == f"Title\n{first.text}"


def test_cutting_short_lines_counts_tokens_a_few_times():
    """White space has tokens of its own: half of them are between the words of a passage."""
    asked = []

    def offsets(text):
        asked.append(text)
        return [match.span() for match in re.finditer(r"\w+|\s", text)]

    text = "\n".join(f"w{n}" for n in range(2_000))
    cut = passages(Document("x", (Block(text, (), 1, 2_000),)), offsets, 256, 0)
    assert max(len(offsets(passage.text)) for passage in cut) <= 256
    assert [passage.first for passage in cut[:2]] == [1, cut[0].last + 1]
    assert len(asked) < 13 * len(cut)


def test_headings_count_where_there_is_little_room():
    """The text below its headings fits; headings that would take over half of it lose the outer."""
    text = " ".join(f"w{n}" for n in range(40))

    def cut(headings, room):
        found = passages(Document("x", (Block(text, headings, 1, 1),)), by_word, 16, 4, room)
        assert {word for passage in found for word in passage.text.split()} == set(text.split())
        return found

    free, ample = cut(("a b", "c"), None), cut(("a b", "c"), 20)
    assert free == ample
    tight = cut(("a b", "c"), 16)
    assert {passage.headings for passage in tight} == {("a b", "c")}
    assert max(len(by_word(passage.in_context)) for passage in tight) == 16
    assert {passage.headings for passage in cut(("a b c d", "e"), 10)} == {("e",)}
    assert {passage.headings for passage in cut(("a b c d",), 6)} == {()}


def test_passages_of_a_real_tokenizer(found):
    """Byte-level tokens hold a space or a part of a character: no passage is over the size all the
    same.
    """
    tokenizer = Tokenizer.from_file(str(TINY))

    def offsets(text):
        return tokenizer.encode(text, add_special_tokens=False).offsets

    text = "Ein schönes Wort: naïve café 🎉🎉 数据 " * 30
    document = Document("x", (Block(text, (), 1, 1), *found[0]["a.md"].blocks))
    cut = passages(document, offsets, 40, 8)
    assert max(len(offsets(passage.text)) for passage in cut) <= 40
    assert set(text) <= set("".join(passage.text for passage in cut))

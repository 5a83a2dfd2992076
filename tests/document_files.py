"""Small real files of the formats that are read, made on the spot."""

import json
from pathlib import Path

MARKDOWN = """---
title: front matter
---
# Guide

Opening words.
They go on.

## Install

- first step
- second step

```sh
# no heading
```

## Use

Last words.
"""
RST = """=====
Guide
=====

Opening words.

Install
=======

First step.

Details
-------

A detail.

Use
===

Last words.
"""
HTML = """<html><head><title>t</title></head><body>
<nav><a href="/">Home</a></nav>
<article>
<h1>Guide</h1>
<p>Opening words of a page that says enough to be taken for one with a content of its own.</p>
<h2>Install</h2>
<p>First step of the installation, told in a sentence that a reader can follow at ease.</p>
</article></body></html>
"""
PYTHON = '''"""Module words."""

class Store:
    """
    Keeps things.

    And finds them.
    """

    def find(self, key):
        """Return what was kept."""
        return 1

    def plain(self):
        return 2
'''


def pdf_bytes(*pages: str, encrypted: bool = False) -> bytes:
    """A PDF of lines of Helvetica; a page of no text has a line drawn on it, as a scan has."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids[{kids}]/Count {count}>>",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    for i, text in enumerate(pages):
        shown = " ".join(f"({line}) Tj 0 -14 Td" for line in text.splitlines())
        drawn = f"BT /F1 12 Tf 50 700 Td {shown} ET" if text else "0 0 m 100 100 l S"
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Resources<</Font<</F1 3 0 R>>>>"
            f"/Contents {5 + 2 * i} 0 R>>"
        )
        objects.append(f"<</Length {len(drawn)}>>stream\n{drawn}\nendstream")
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    key = "00" * 32
    lock = f"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<{key}>/U<{key}>>>/ID[<00><00>]"
    return (
        out
        + (
            f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n"
            f"<</Size {len(objects) + 1}/Root 1 0 R{lock if encrypted else ''}>>\n"
            f"startxref\n{len(out)}\n%%EOF\n"
        ).encode()
    )


def write_docx(path: Path) -> None:
    from docx import Document

    document = Document()
    document.add_heading("Guide", 1)
    document.add_paragraph("Opening words.")
    document.add_heading("Install", 2)
    table = document.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "step", "one"
    document.save(str(path))


def write_notebook(path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Guide\n"]},
        {"cell_type": "markdown", "metadata": {}, "source": ["Opening words.\n", "More."]},
        {"cell_type": "code", "metadata": {}, "outputs": [], "source": ["answer = 42\n"]},
    ]
    tree = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(tree, indent=1))


def write_all(folder: Path) -> Path:
    """A folder with a file of each kind."""
    folder.mkdir(exist_ok=True)
    (folder / "a.md").write_text(MARKDOWN)
    (folder / "b.txt").write_text("Opening words.\r\nMore.\r\n\r\nLast words.\r\n")
    (folder / "c.rst").write_text(RST)
    (folder / "d.html").write_text(HTML)
    (folder / "e.pdf").write_bytes(pdf_bytes("Opening words.\nMore.", "Last words."))
    write_docx(folder / "f.docx")
    write_notebook(folder / "g.ipynb")
    (folder / "h.jsonl").write_text(
        '{"title": "Guide", "text": "Opening words."}\n{"n": 1}\n{"text": "Last words."}\n'
    )
    (folder / "i.py").write_text(PYTHON)
    (folder / "j.js").write_text("// Opening words.\nf()\n\n// Last words.\n")
    return folder

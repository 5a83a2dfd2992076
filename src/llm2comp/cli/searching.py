"""Commands for documents: index, search."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm2comp.cli.options import MODEL_HELP, USE, DeviceOption, app
from llm2comp.cli.verify_options import KeyOption
from llm2comp.errors import DataError
from llm2comp.system.console import GENERAL, say

if TYPE_CHECKING:
    from llm2comp.use.index.hits import Hit
    from llm2comp.use.index.index import Mode

DbOption = Annotated[
    Path, typer.Option("--db", help="Folder of the index.", metavar="DIR", show_default=False)
]
MigrateOption = Annotated[
    str | None,
    typer.Option(
        help="Embed all passages anew with another model; searches go on meanwhile.",
        metavar="MODEL",
    ),
]
PassageOption = Annotated[
    int | None,
    typer.Option(
        min=16,
        help="Most tokens of a passage of a new index. Default: 256, or what the model reads.",
        metavar="N",
    ),
]
RemoveOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="Take this file, or all below this folder, out of the index; may be repeated.",
        metavar="PATH",
    ),
]


@app.command(rich_help_panel=USE)
def index(
    db: DbOption,
    documents: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders or files: md, txt, rst, html, pdf, docx, ipynb, jsonl, source code.",
            metavar="DOCS",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=f"{MODEL_HELP} Default: the index's own; {GENERAL} for a new one.",
            metavar="MODEL",
        ),
    ] = None,
    migrate: MigrateOption = None,
    remove: RemoveOption = None,
    passage_tokens: PassageOption = None,
    overlap: Annotated[
        int, typer.Option(min=0, help="Tokens that neighbours share in a new index.", metavar="N")
    ] = 32,
    device: DeviceOption = None,
) -> None:
    """Index folders of documents; only what has changed is read and embedded again."""
    from llm2comp.recipe import expanded
    from llm2comp.system.folders import INDEX, refuse_taken
    from llm2comp.use.index.info import read_info, require_info

    db = expanded(db)
    if [bool(documents), bool(remove), migrate is not None].count(True) != 1:
        expected = "folders to index, --remove PATH, or --migrate MODEL"
        raise DataError("nothing to do, or two things", expected=expected)
    if not documents:
        require_info(db)
    elif read_info(db) is None:
        refuse_taken(db, INDEX)
    from llm2comp.use.index.index import Index  # lancedb is missing: said before torch loads

    made = Index(db, model, device=device, passage_tokens=passage_tokens, overlap=overlap)
    for path in remove or ():
        say(f"{path}: {made.remove(path):,} files taken out of the index")
    for folder in documents or ():
        made.require(folder)
    if remove:
        return
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    if migrate is not None:
        if long := made.migrate(migrate):
            say(
                f"{long:,} passages are longer than {migrate} reads: index into a new folder for it"
            )
        info = made.info
        say(f"{db}: {info['passages']:,} passages, of {info['model']} now")
    for folder in documents or ():
        say(made.add(folder).summary())


@app.command(rich_help_panel=USE)
def search(
    question: Annotated[str, typer.Argument(help="What to look for.", metavar="QUESTION")],
    db: Annotated[
        Path | None, typer.Option("--db", help="Folder of the index.", metavar="DIR")
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(help="Ask a running `llm2comp serve --db` instead: at once.", metavar="URL"),
    ] = None,
    key: KeyOption = None,
    count: Annotated[
        int, typer.Option("--count", "-k", min=1, help="How many passages.", metavar="N")
    ] = 10,
    vectors_only: Annotated[
        bool, typer.Option("--vectors-only", help="By meaning alone, not by words.")
    ] = False,
    keywords_only: Annotated[
        bool, typer.Option("--keywords-only", help="By words alone (BM25): no model is loaded.")
    ] = False,
    path: Annotated[
        str | None,
        typer.Option(help="Only files that this names: guide, '*.md'.", metavar="PATTERN"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object per line.")] = False,
    device: DeviceOption = None,
) -> None:
    """Search an index by words and meaning at once."""
    if vectors_only and keywords_only:
        raise DataError("--vectors-only and --keywords-only exclude each other")
    mode: Mode = "vectors" if vectors_only else "keywords" if keywords_only else "hybrid"
    if url is not None and db is None:
        from llm2comp.use.index.remote import search_at

        hits = search_at(url, question, count, mode, path, key)
    elif db is not None and url is None:
        hits = _search_here(db, question, count, mode, path, device)
    else:
        raise DataError("where to search?", expected="--db DIR, or --url URL")
    if as_json:
        from dataclasses import asdict

        from llm2comp.system.files import to_json

        for hit in hits:
            print(to_json(asdict(hit), ensure_ascii=False))
    elif hits:
        _show(hits)
    else:
        say("nothing found")


def _search_here(
    db: Path, question: str, count: int, mode: Mode, path: str | None, device: str | None
) -> list[Hit]:
    from llm2comp.use.index.info import require_info

    require_info(db)
    from llm2comp.use.index.index import Index

    if mode != "keywords":
        from llm2comp.model.backbone.quiet import quiet_libraries

        quiet_libraries()
    return Index(db, device=device).search(question, count, mode=mode, path=path)


def _show(hits: list[Hit]) -> None:
    """`file:line  headings`, and below it a snippet with the matched words in bold."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for hit in hits:
        near = os.path.relpath(hit.path)
        shown = Text(_printable(hit.path if near.startswith("..") else near), "cyan")
        console.print(shown.append(f":{hit.first}").append(f"  {_printable(hit.heading)}", "dim"))
        snippet = _printable(hit.snippet)
        text = Text(f"    {snippet}")
        for start, end in hit.spans(snippet):
            text.stylize("bold", start + 4, end + 4)
        console.print(text)
    sys.stdout.flush()


def _printable(text: str) -> str:
    """What a terminal cannot take for a command of its own, on one line."""
    return "".join(c if c.isprintable() else " " for c in text)

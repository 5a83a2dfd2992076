"""Commands that fit an encoder to a user's own documents: adapt, budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2comp.cli.evaluate_options import AnswerColumnOption, QueryColumnOption
from llm2comp.cli.options import (
    JUDGE,
    MAKE,
    MODEL_HELP,
    ColumnOption,
    DeviceOption,
    ModelOption,
    app,
    read_column,
    require_folder,
    require_model,
)
from llm2comp.errors import DataError
from llm2comp.system.console import GENERAL, say

DocumentsArgument = Annotated[
    str,
    typer.Argument(
        help="Folder of documents (.md, .txt, .rst, .html, .pdf, .docx, .ipynb, .jsonl, source "
        "code), one such file, or builtin:python-docs.",
        metavar="DOCS",
    ),
]
MinutesOption = Annotated[
    float, typer.Option(min=0.1, help="For scoring and training together.", metavar="N")
]
RetentionOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="Folder of evaluation sets on which nothing should be lost; repeatable.", metavar="DIR"
    ),
]
NegativesOption = Annotated[
    int, typer.Option(min=0, max=8, help="Hard negatives mined for each pair.", metavar="N")
]
GuideOption = Annotated[
    bool, typer.Option(help="Let the starting encoder take false negatives out of the batches.")
]
QuestionsOption = Annotated[
    bool,
    typer.Option(
        "--write-questions", help="Let the LM write questions about the passages; train on them."
    ),
]
PretextOption = Annotated[
    bool, typer.Option("--pretext", help="Let stage 1 (CTKD) read the passages before.")
]


@app.command(rich_help_panel=MAKE)
def adapt(
    documents: DocumentsArgument,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Run; default: runs/NAME-adapted.", metavar="RUN"),
    ] = None,
    model: ModelOption = GENERAL,
    minutes: MinutesOption = 10.0,
    retention: RetentionOption = None,
    negatives: NegativesOption = 0,
    guide: GuideOption = True,
    write_questions: QuestionsOption = False,
    pretext: PretextOption = False,
    device: DeviceOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.", metavar="N")] = 0,
) -> None:
    """Fit an encoder to your documents without labels, and say whether it is worth using."""
    if not documents.startswith("builtin:") and not Path(documents).exists():
        raise DataError("no such file or folder", where=documents)
    require_model(model, "--model")
    for folder in retention or ():
        require_folder(folder.expanduser())
    from llm2comp.system.folders import RUN, refuse_taken

    if out is not None:
        refuse_taken(out, RUN)
    from llm2comp.lab.adapt import adapt as fit

    fit(
        documents,
        out,
        model,
        minutes,
        retention=retention or (),
        negatives=negatives,
        guide=guide,
        write_questions=write_questions,
        pretext=pretext,
        device=device,
        seed=seed,
    )


@app.command(rich_help_panel=JUDGE)
def budget(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    texts: Annotated[
        str, typer.Option(help="File of passages to be found.", metavar="FILE", show_default=False)
    ],
    column: ColumnOption = "text",
    pairs: Annotated[
        str | None,
        typer.Option(
            help="File of questions and answers; without it first sentences ask for the rest.",
            metavar="FILE",
        ),
    ] = None,
    query_column: QueryColumnOption = "anchor",
    answer_column: AnswerColumnOption = "positive",
    limit: Annotated[int | None, typer.Option(min=1, help="Passages at most.", metavar="N")] = 1000,
    every: Annotated[
        bool, typer.Option("--all", help="Show every row, not only those worth their bytes.")
    ] = False,
    export: Annotated[
        int | None,
        typer.Option(min=1, help="Write the encoder of this row to --out.", metavar="ROW"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --export: where to.", metavar="DIR")
    ] = None,
    device: DeviceOption = None,
) -> None:
    """Choose memory tokens, dimensions and precision: quality against bytes, measured."""
    from llm2comp.data.sources import check_sources, read_pairs
    from llm2comp.recipe import PairData, TextData
    from llm2comp.system.folders import EXPORTED, refuse_foreign

    if (export is None) != (out is None):
        raise DataError("are given together", where="--export, --out", expected="both or none")
    require_model(model)
    check_sources([TextData(source=texts), *([TextData(source=pairs)] if pairs else [])])
    if out is not None:
        refuse_foreign(out, EXPORTED)
    passages = read_column(texts, column, limit).rows
    asked = (
        read_pairs(PairData(source=pairs, anchor=query_column, positive=answer_column)).rows
        if pairs
        else []
    )
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.lab import budget as measured

    rows = measured.budget(model, passages, asked, device)
    shown = rows if every else measured.worth(rows)
    say(measured.table(shown))
    if export is not None and out is not None:
        if export > len(shown):
            raise DataError(
                "no such row", where="--export", expected=f"1 to {len(shown)}", found=export
            )
        say(f"encode with: {measured.export_row(model, shown[export - 1], out, device)}")

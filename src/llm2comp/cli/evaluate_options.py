"""The options of `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TasksOption = Annotated[
    list[str] | None,
    typer.Option(
        help="paper14 (the paper's 14), or a task or benchmark of mteb's; repeatable.",
        metavar="NAME",
    ),
]
PairsOption = Annotated[
    list[str] | None,
    typer.Option(
        help="File of questions and answers: each question must find its answer; repeatable.",
        metavar="FILE",
    ),
]
QueryColumnOption = Annotated[
    str, typer.Option(help="With --pairs: column of the questions.", metavar="NAME")
]
AnswerColumnOption = Annotated[
    str, typer.Option(help="With --pairs: column of the answers.", metavar="NAME")
]
DocumentsOption = Annotated[
    str | None, typer.Option(help="With --pairs: file of more texts to search in.", metavar="FILE")
]
DocumentColumnOption = Annotated[
    str, typer.Option(help="With --documents: column of the texts.", metavar="NAME")
]
ScoresOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of results; default: scores/ in the model's run, else llm2comp-scores/.",
        metavar="DIR",
    ),
]
CompareOption = Annotated[
    bool,
    typer.Option("--compare", help="Also show models evaluated before, and the published figures."),
]
InstructionsOption = Annotated[
    str,
    typer.Option(
        help="auto: the paper's, for models that know instructions; none; or a YAML file "
        "of task: text.",
        metavar="WHICH",
    ),
]
TemplateOption = Annotated[
    str, typer.Option(help="How an instruction is put before a text.", metavar="TEXT")
]

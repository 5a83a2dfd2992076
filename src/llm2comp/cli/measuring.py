"""Commands that judge encoders: evaluate, analyze, report, study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm2comp.cli.analyze_options import (
    AnalysedTextsOption,
    AnalysisOption,
    FirstRowsOption,
    RelatedPairsOption,
    ThresholdOption,
    WriteWeightsOption,
)
from llm2comp.cli.evaluate_options import (
    AnswerColumnOption,
    CompareOption,
    DocumentColumnOption,
    DocumentsOption,
    InstructionsOption,
    PairsOption,
    QueryColumnOption,
    ScoresOption,
    TasksOption,
    TemplateOption,
)
from llm2comp.cli.making import REPORT_FILE
from llm2comp.cli.options import (
    JUDGE,
    MAKE,
    MODEL_HELP,
    ColumnOption,
    DeviceOption,
    LocalOption,
    MemoryOption,
    TokensOption,
    app,
    read_column,
    require_folder,
)
from llm2comp.errors import DataError, RunError
from llm2comp.system.console import GENERAL, say

ModelsArgument = Annotated[
    list[str],
    typer.Argument(help=f"{MODEL_HELP} Also bm25 and tfidf: word matching.", metavar="MODEL"),
]


@app.command(rich_help_panel=JUDGE)
def evaluate(
    models: ModelsArgument = [GENERAL],  # noqa: B006
    tasks: TasksOption = None,
    local: LocalOption = None,
    pairs: PairsOption = None,
    query_column: QueryColumnOption = "anchor",
    answer_column: AnswerColumnOption = "positive",
    documents: DocumentsOption = None,
    document_column: DocumentColumnOption = "text",
    out: ScoresOption = None,
    compare: CompareOption = False,
    instructions: InstructionsOption = "auto",
    template: TemplateOption = "{instruction}:",
    max_tokens_per_batch: TokensOption = None,
    num_memory: MemoryOption = None,
    device: DeviceOption = None,
) -> None:
    """Score models on public tasks, your own sets, or your own questions and answers."""
    _check_sources(local or [], pairs or [], documents)
    from llm2comp.model.backbone.quiet import quiet_libraries

    if "{instruction}" not in template:
        raise DataError(
            "no template",
            where="--template",
            expected="a text with {instruction} in it",
            found=template,
        )
    quiet_libraries()
    from llm2comp.lab.evaluation import evaluate as evaluation
    from llm2comp.lab.evaluation import summary
    from llm2comp.lab.evaluation.pairs import Questions

    chosen, folders = tuple(tasks or ()), tuple(local or ())
    asked = tuple(
        Questions(file, query_column, answer_column, documents, document_column)
        for file in pairs or ()
    )
    options = evaluation.EvaluateOptions(
        chosen, folders, instructions, template, max_tokens_per_batch, device, num_memory, asked
    )
    rows = evaluation.evaluate(models, options, out)
    before = (
        summary.earlier_rows(rows, summary.results_folder(models[0], out, models))
        if compare
        else []
    )
    say(summary.table([*before, *rows], compare))
    if failed := {task for row in rows for task in row.failed}:
        raise RunError(
            f"{len(failed)} tasks could not be run: {', '.join(sorted(failed))}",
            fix="see above, then run it again",
        )


def _check_sources(local: list[Path], pairs: list[str], documents: str | None) -> None:
    """Check that the files `evaluate` will read exist, before heavy imports."""
    from llm2comp.data.sources import check_sources
    from llm2comp.recipe import TextData

    for folder in local:
        require_folder(folder)
    if documents and not pairs:
        raise DataError(
            "nothing to be found in it",
            where="--documents",
            expected="--pairs FILE, the questions and answers",
        )
    check_sources(TextData(source=file) for file in (*pairs, *([documents] if documents else [])))


@app.command(rich_help_panel=JUDGE)
def analyze(
    texts: AnalysedTextsOption,
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")] = GENERAL,
    pairs: RelatedPairsOption = None,
    column: ColumnOption = "text",
    limit: FirstRowsOption = 5000,
    out: AnalysisOption = None,
    threshold: ThresholdOption = 0.9,
    write_weights: WriteWeightsOption = False,
    device: DeviceOption = None,
) -> None:
    """Show why a model is good or bad: collapse, similarity, contents of its memory tokens."""
    from llm2comp.data.columns import MissingColumnError
    from llm2comp.data.sources import read_pairs
    from llm2comp.recipe import PairData
    from llm2comp.system.folders import ANALYSIS, refuse_taken

    if out:
        refuse_taken(out, ANALYSIS)
    loaded = read_column(texts, column, limit)
    try:
        related = read_pairs(PairData(source=pairs, limit=limit)).rows if pairs else []
    except MissingColumnError as error:
        raise error.advised("call the columns anchor and positive in the file") from None
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.lab import analysis_table
    from llm2comp.lab import analyze as analysis

    found = analysis.analyze(
        model, loaded.rows, related, threshold=threshold, needs_memory=write_weights, device=device
    )
    folder = out or analysis.default_folder(model)
    analysis.write_analysis(found, folder)
    say(analysis_table.table(found))
    for line in analysis_table.readout_lines(found):
        say(line)
    say(f"{folder}: {analysis.ANALYSIS_FILE} and plots")
    if write_weights and (weights := found.merge_weights):
        from llm2comp.storage.reweighting import reweight

        for changed in reweight(model, weights):
            say(
                f"{changed}: memory tokens now weigh "
                f"{', '.join(f'{weight:.3f}' for weight in weights)}"
            )


@app.command(rich_help_panel=JUDGE)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of runs; several are compared.", metavar="RUN")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Page to write; default: report.html in the first run.", metavar="FILE"),
    ] = None,
) -> None:
    """Write one HTML page about runs: verdict, curves, scores, settings."""
    for run in runs:
        require_folder(run)
    from llm2comp.model.backbone.quiet import quiet_libraries

    quiet_libraries()
    from llm2comp.lab.report import report as write_report

    say(f"report: {write_report(runs, out or runs[0] / REPORT_FILE)}")


@app.command(rich_help_panel=MAKE)
def study(
    file: Annotated[
        str,
        typer.Argument(
            help="YAML file, or the name of a study of the package (objectives, ...; "
            "docs/studies.md).",
            metavar="STUDY",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the study; default: studies/ and its name.", metavar="DIR"),
    ] = None,
    local: LocalOption = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change to all recipes; repeatable.", metavar="KEY=VALUE"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="In place of the study's own recipe; a name or a file."),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", help="In place of the study's seeds; repeatable.", min=0),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Of its systems, training-free encoders and models this one alone; repeatable.",
            metavar="ROW",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list runs and stages.")] = False,
    workers: Annotated[
        int,
        typer.Option(min=1, help="Processes at once; with CUDA each sees one device.", metavar="N"),
    ] = 1,
) -> None:
    """Train several recipes with several seeds and compare them in one table.

    Run again to resume.
    """
    from llm2comp.lab.study.definition import find_study

    find_study(file)
    for folder in local or ():
        require_folder(folder)
    from llm2comp.lab.study.running import study as run_study

    given = {"recipe": recipe, "seeds": seeds, "only": only}
    replaced = {key: value for key, value in given.items() if value}
    run_study(file, out, local or (), changes or (), dry_run, workers, replaced)

"""`llm2comp study`: train missing runs, score encoders, write tables; run again to resume.

studies/NAME/study.yaml         the study as it was read
studies/NAME/runs/SYSTEM-seedN/    run directories as those of `train`; equal stages are copied from
                                   one to the other
studies/NAME/scores/            mteb's files; kept/: scores by all that an encoder depends on, and
                                by its sets
studies/NAME/worker-N.log       what each worker said, where there are several
studies/NAME/results.json, table.csv, table.md, *.svg, *.png
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.table import Table

from llm2comp.errors import DataError, RunError
from llm2comp.lab.evaluation.tasks import local_tasks
from llm2comp.lab.plots import save_figure
from llm2comp.lab.study.definition import Study, find_study, load_study
from llm2comp.lab.study.figures import figures
from llm2comp.lab.study.grid import DONE, TRAIN, StudyRun, plan, runs_of, work
from llm2comp.lab.study.jobs import RUNS, Bench, floors, groups
from llm2comp.lab.study.results import Failure, Results, StudyRow, comparisons, merged, records
from llm2comp.lab.study.table import (
    as_csv,
    as_markdown,
    main_cells,
    pair_cells,
    published_cells,
    shown,
)
from llm2comp.lab.study.workers import outcomes
from llm2comp.model.backbone.quiet import quiet_libraries
from llm2comp.recipe import load_recipe
from llm2comp.system.console import say
from llm2comp.system.files import explain_disk_errors, to_json, write_text
from llm2comp.system.folders import STUDY, claim, refuse_taken

RESULTS_FILE = "results.json"


def study(
    file: str | Path,
    out: Path | None = None,
    local: Sequence[Path] = (),
    changes: Sequence[str] = (),
    dry_run: bool = False,
    workers: int = 1,
    replaced: Mapping[str, Any] | None = None,
) -> Results | None:
    """Run a study; what is finished is not done again.

    Args:
        file: study file, or the name of a shipped study.
        out: its folder; default `studies/<name>`.
        local: further folders of local sets.
        changes: further `key.sub=value` overrides for all recipes.
        dry_run: list runs and stages, and return None.
        workers: processes that train and score at once.
        replaced: keys of the study (recipe, seeds, only) to values, in place of the file's.

    Raises:
        Llm2CompError: the study, one of its recipes, its data or sets are not valid (before
            anything is trained); or, after the tables are written, RunError when a run failed.
    """
    quiet_libraries()
    settings = load_study(file, changes, local, replaced)
    where, folder = str(find_study(file)), out or Path("studies") / settings.name
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError(
            "a study is run by one process", where=where, fix="start it without a launcher"
        )
    runs = runs_of(settings, where)
    if dry_run:
        say(_plan_table(runs, folder / RUNS))
        return None
    bench = Bench(
        folder, settings.after, _set_revisions(settings, where), tuple(map(Path, settings.scores))
    )
    with explain_disk_errors(folder):
        refuse_taken(folder, STUDY)
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            claim(folder, STUDY)
            write_text(
                folder / "study.yaml",
                yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False),
            )
            results = _results(settings, runs, bench, workers)
            write_results(results, folder)
    except Timeout as error:
        raise RunError(
            "another process runs this study", where=str(folder), fix="wait, or give another --out"
        ) from error
    if results.failures:
        names = ", ".join(failure.run for failure in results.failures)
        raise RunError(
            f"failed: {names}", where=str(folder), fix="see above or in table.md, then run it again"
        )
    return results


def write_results(results: Results, folder: Path) -> None:
    """Write tables, results.json and plots, and show the tables; same results, same files."""
    content = results.model_dump(mode="json") | {
        "table": records(results),
        "pairs": comparisons(results),
    }
    write_text(folder / RESULTS_FILE, to_json(content, indent=1))
    write_text(folder / "table.csv", as_csv(records(results)))
    write_text(folder / "table.md", as_markdown(results))
    drawn = figures(results)
    with explain_disk_errors(folder):
        for old in (*folder.glob("averages.*"), *folder.glob("over-*.*")):
            if old.stem not in drawn and old.suffix in (".png", ".svg"):
                old.unlink()
    for name, figure in drawn.items():
        save_figure(figure, folder / name)
    say(shown(f"study {results.name}, percent", *main_cells(results), words=2))
    header, rows = pair_cells(results)
    if rows:
        say(shown("pairs, 95 % interval of the paired bootstrap", header, rows, words=2))
    if results.published:
        header, rows = published_cells()
        say(
            shown(
                "published, cited; other tasks and backbones",
                header[:4],
                [row[:4] for row in rows],
                words=2,
            )
        )
    say(f"{folder}: table.md, table.csv, {RESULTS_FILE} and plots")


def _results(settings: Study, runs: Sequence[StudyRun], bench: Bench, workers: int) -> Results:
    """Train and score all."""
    lm = load_recipe(settings.recipe, settings.overrides).model
    wanted = settings.wanted
    beside = floors(wanted(settings.training_free), wanted(settings.models), lm)
    states = plan(runs, bench.runs)
    total, worked, ended = sum(work(run, states[run.name]) for run in runs), 0, 0
    named = [
        (run, asked)
        for asked in settings.after
        for run in runs
        if asked in run.scored(settings.after)
    ]
    rows = {
        (floor.name, floor.stage): StudyRow(system=floor.name, stage=floor.stage, base=floor.name)
        for floor in beside
    }
    rows |= {
        (run.system, asked): StudyRow(system=run.system, stage=asked, base=run.base, axes=run.axes)
        for run, asked in named
    }
    failures: list[Failure] = []
    begin = time.monotonic()
    for outcome in outcomes([*beside, *groups(runs)], bench, workers):
        for failure in outcome.failures:
            say(f"failed: {failure.run}: {failure.reason}")
        failures += outcome.failures
        for row in outcome.rows:
            place = (row.system, row.stage)
            rows[place] = merged(rows[place], row)
        if not outcome.is_run:
            say(f"{outcome.name}: {outcome.told}")
            continue
        worked, ended = worked + outcome.samples, ended + 1
        left = _time_left(time.monotonic() - begin, worked / total if worked else ended / len(runs))
        say(f"run {ended}/{len(runs)} {outcome.name}: {outcome.told}; {left}")
    return Results(
        name=settings.name,
        sets=tuple(bench.sets),
        rows=tuple(rows.values()),
        failures=tuple(sorted(failures, key=lambda failure: (failure.system, failure.run))),
        published=settings.published,
    )


def _set_revisions(settings: Study, where: str) -> dict[str, str]:
    """Name of each local set → revision, which is made from its files.

    Raises DataError: no set, or a malformed one.
    """
    if not settings.scores:
        raise DataError(
            "nothing to score on",
            where=where,
            expected="scores: [folder, ...] in it, or --local DIR",
        )
    tasks = [task for folder in settings.scores for task in local_tasks(Path(folder).expanduser())]
    found = {task.metadata.name: task.metadata.dataset["revision"] for task in tasks}
    if len(found) < len(tasks):
        raise DataError(
            "two sets have one name",
            where=where,
            found=", ".join(settings.scores),
            fix="rename or leave out one",
        )
    return found


def _time_left(spent: float, share: float) -> str:
    return f"{spent:.0f} s, about {spent / share - spent:.0f} s left"


def _plan_table(runs: Sequence[StudyRun], folder: Path) -> Table:
    """Runs down; what happens to each of their stages."""
    states, stages = (
        plan(runs, folder),
        list(dict.fromkeys(stage for run in runs for stage in run.keys)),
    )
    table = Table("run", *stages, "samples to train", title=str(folder), title_justify="left")
    for run in runs:
        told = [states[run.name].get(stage, "–") for stage in stages]
        cells = [state if state in (DONE, TRAIN, "–") else f"from {state}" for state in told]
        table.add_row(run.name, *cells, f"{work(run, states[run.name]):,}")
    return table

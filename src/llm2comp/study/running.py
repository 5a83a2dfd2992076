"""`llm2comp study`: train every run that is missing, score its encoders, write the tables; run again to go on.

studies/NAME/study.yaml         the study as it was read
studies/NAME/runs/SYSTEM-seedN/    run directories as those of `train`; equal stages are copied from one to the other
studies/NAME/scores/            mteb's files; kept.json: scores by all that an encoder depends on, and by its sets
studies/NAME/results.json, table.csv, table.md, *.svg, *.png
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout
from rich.table import Table

from llm2comp.analysis.plots import save_figure
from llm2comp.backbone import weights_digest
from llm2comp.backbone.quiet import quiet_libraries
from llm2comp.console import say
from llm2comp.errors import DataError, Llm2CompError, RunError, one_line
from llm2comp.evaluate import Options, evaluate
from llm2comp.files import explain_disk_errors, write_text
from llm2comp.recipe import load_recipe
from llm2comp.report.reading import read_log
from llm2comp.study.grid import DONE, TRAIN, Run, begun, plan, runs_of, samples_of, work
from llm2comp.study.plots import figures
from llm2comp.study.settings import Study, find_study, load_study
from llm2comp.study.table import (
    MODEL,
    TRAINING_FREE,
    Failure,
    Results,
    Row,
    as_csv,
    as_markdown,
    comparisons,
    main_cells,
    pair_cells,
    published_cells,
    records,
    shown,
)
from llm2comp.training.run import DONE_FILE, MODEL_FOLDER, RECIPE_FILE, is_done, train

RUNS, SCORES, KEPT_FILE, RESULTS_FILE = "runs", "scores", "kept.json", "results.json"


def study(
    file: str | Path,
    out: Path | None = None,
    local: Sequence[Path] = (),
    changes: Sequence[str] = (),
    dry_run: bool = False,
) -> Results | None:
    """Run a study; what is finished is not done again.

    Args:
        file: study file, or the name of a shipped study.
        out: its folder; default `studies/<name>`.
        local: further folders of local sets.
        changes: further `key.sub=value` overrides of the common ground.
        dry_run: list runs and stages, and return None.

    Raises:
        Llm2CompError: the study, one of its recipes, its data or sets are not valid (before anything is trained); or, after
            the tables are written, RunError when a run failed.
    """
    quiet_libraries()
    settings = load_study(file, changes, local)
    where, folder = str(find_study(file)), out or Path("studies") / settings.name
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RunError("a study is run by one process", where=where, fix="start it without a launcher")
    runs = runs_of(settings, where)
    if dry_run:
        say(_plan_table(runs, folder / RUNS))
        return None
    sets = _set_revisions(settings, where)
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            write_text(folder / "study.yaml", yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
            results = _Running(settings, runs, sets, folder).results()
            write_results(results, folder)
    except Timeout as error:
        raise RunError("another process runs this study", where=str(folder), fix="wait, or give another --out") from error
    if results.failures:
        names = ", ".join(failure.run for failure in results.failures)
        raise RunError(f"failed: {names}", where=str(folder), fix="see above or in table.md, then run it again")
    return results


def write_results(results: Results, folder: Path) -> None:
    """Write the tables, results.json and plots, and show the tables; the same results give the same files."""
    content = results.model_dump(mode="json") | {"table": records(results), "pairs": comparisons(results)}
    write_text(folder / RESULTS_FILE, json.dumps(content, indent=1))
    write_text(folder / "table.csv", as_csv(records(results)))
    write_text(folder / "table.md", as_markdown(results))
    for name, figure in figures(results).items():
        save_figure(figure, folder / name)
    say(shown(f"study {results.name}, percent", *main_cells(results), words=2))
    header, rows = pair_cells(results)
    if rows:
        say(shown("pairs, 95 % interval of the paired bootstrap", header, rows, words=2))
    if results.published:
        header, rows = published_cells()
        say(shown("published, cited; other tasks and backbones", header[:4], [row[:4] for row in rows], words=2))
    say(f"{folder}: table.md, table.csv, {RESULTS_FILE} and plots")


class _Running:
    """One pass over a study: what it found so far."""

    def __init__(self, settings: Study, runs: Sequence[Run], sets: dict[str, str], folder: Path) -> None:
        self.settings, self.runs, self.sets, self.folder = settings, runs, sets, folder
        self.common = load_recipe(settings.recipe, settings.overrides)
        self.failures: list[Failure] = []
        self.dead: dict[str, str] = {}  # key of a stage that could not be trained → why
        self.kept_file = folder / SCORES / KEPT_FILE
        self.kept: dict[str, dict[str, float]] = _read_kept(self.kept_file)

    def results(self) -> Results:
        """Train and score all."""
        free = [self._floor(name, f"{name}:{self.common.model.name}", TRAINING_FREE) for name in self.settings.training_free]
        free += [self._floor(name, name, MODEL) for name in self.settings.models]
        begin, states = time.monotonic(), plan(self.runs, self.folder / RUNS)
        total, worked = sum(work(run, states[run.name]) for run in self.runs), 0
        rows: dict[tuple[str, str], Row] = {}
        for asked in self.settings.after:
            for run in self.runs:
                if asked in run.scored(self.settings.after):
                    rows[run.system, asked] = Row(system=run.system, stage=asked, base=run.base, axes=run.axes)
        for number, run in enumerate(self.runs, 1):
            trained = self._train(run)
            gc.collect()  # models and trainers refer to each other: without it the next run may find no memory
            for name, stage in run.scored(self.settings.after).items():
                if is_done(run.folder(self.folder / RUNS, stage), run.keys[stage]):
                    rows[run.system, name] = self._with_seed(rows[run.system, name], run, stage)
            worked += work(run, states[run.name])
            share = worked / total if worked else number / len(self.runs)
            spent = time.monotonic() - begin
            told = _told(states[run.name]) if trained else "failed"
            say(f"run {number}/{len(self.runs)} {run.name}: {told}; {_time_left(spent, share)}")
        return Results(
            name=self.settings.name,
            sets=tuple(self.sets),
            rows=(*free, *rows.values()),
            failures=tuple(self.failures),
            published=self.settings.published,
        )

    def _train(self, run: Run) -> bool:
        """Train what a run lacks, or note why it failed; a stage that failed once is not tried again for another run."""
        folder = self.folder / RUNS / run.name
        if _is_finished(run, folder):
            return True
        reason = next((self.dead[key] for key in run.keys.values() if key in self.dead), None)
        if reason is None:
            try:
                siblings = [self.folder / RUNS / other.name for other in self.runs if other is not run]
                train(run.recipe, folder, siblings=siblings)
                return True
            except (Llm2CompError, torch.OutOfMemoryError) as error:
                reason = one_line(error, 400)
                for stage, key in run.keys.items():
                    place = run.folder(self.folder / RUNS, stage)
                    if begun(place, key) and not is_done(place, key):
                        self.dead[key] = reason
        self._failed(run.system, run.name, reason)
        return False

    def _with_seed(self, row: Row, run: Run, stage: str) -> Row:
        """A row with what one run's encoder after a stage got."""
        logs = read_log(self.folder / RUNS / run.name, run.name).stages
        trained = logs[: [log.name for log in logs].index(stage) + 1]
        samples = sum(samples_of(log.settings, log.reached) for log in trained)
        result = trained[-1].result
        # An encoder depends on its stage and on how long a text it reads, which may be a later stage's setting.
        limit = run.recipe.max_tokens or list(run.keys.values())[-1]
        scores = self._score(run.system, str(run.folder(self.folder / RUNS, stage)), [run.keys[stage], limit])
        return row.model_copy(
            update={
                "scores": row.scores | {run.seed: scores},
                "ranks": row.ranks | ({run.seed: result.effective_rank} if result else {}),
                "samples": row.samples | {run.seed: samples},
            }
        )

    def _floor(self, name: str, model: str, stage: str) -> Row:
        """The row of a model that this study does not train."""
        key = [model, weights_digest(self.common.model)] if stage == TRAINING_FREE else None
        device = None if self.common.model.device == "auto" else self.common.model.device
        return Row(system=name, stage=stage, base=name, scores={0: self._score(name, model, key, device)})

    def _score(self, system: str, model: str, key: Any, device: str | None = None) -> dict[str, float]:
        """Set → percent, for the sets that could be scored; `key` = all that the encoder depends on, None where not known."""
        digest = hashlib.sha256(json.dumps([key, self.sets], sort_keys=True).encode()).hexdigest()
        if key is not None and digest in self.kept:
            return self.kept[digest]
        options = Options(local=tuple(map(Path, self.settings.scores)), device=device)
        try:
            (row,) = evaluate([model], options, self.folder / SCORES)
        except (Llm2CompError, torch.OutOfMemoryError) as error:
            self._failed(system, model, one_line(error, 400))
            return {}
        for task, why in row.failed.items():
            self._failed(system, f"{model}, {task}", why)
        scores = {task: round(100 * found["score"], 4) for task, found in row.scores.items()}
        if key is not None and not row.failed:
            self.kept[digest] = scores
            write_text(self.kept_file, json.dumps(self.kept, indent=1))
        return scores

    def _failed(self, system: str, what: str, reason: str) -> None:
        say(f"failed: {what}: {reason}")
        self.failures.append(Failure(system=system, run=what, reason=reason))


def _set_revisions(settings: Study, where: str) -> dict[str, str]:
    """Name of each local set → revision, which is made from its files. Raises DataError: no set, or a malformed one."""
    if not settings.scores:
        raise DataError("nothing to score on", where=where, expected="scores: [folder, ...] in it, or --local DIR")
    from llm2comp.evaluation.tasks import local_tasks

    tasks = [task for folder in settings.scores for task in local_tasks(Path(folder).expanduser())]
    found = {task.metadata.name: task.metadata.dataset["revision"] for task in tasks}
    if len(found) < len(tasks):
        raise DataError("two sets have one name", where=where, found=", ".join(settings.scores), fix="rename or leave out one")
    return found


def _is_finished(run: Run, folder: Path) -> bool:
    """Whether nothing of a run is missing, settings that change no weights included."""
    if not (folder / MODEL_FOLDER / DONE_FILE).is_file():
        return False
    trained = all(is_done(run.folder(folder.parent, stage), key) for stage, key in run.keys.items())
    return trained and (folder / RECIPE_FILE).read_text(encoding="utf-8") == run.recipe.to_yaml()


def _read_kept(file: Path) -> dict[str, dict[str, float]]:
    """Scores of an earlier call; none where there is no such file, or a damaged one: scored anew."""
    try:
        found: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


def _told(states: dict[str, str]) -> str:
    """`pretext from CTKD-seed0, ucl trained`."""
    words = {DONE: "done before", TRAIN: "trained"}
    return ", ".join(f"{stage} {words.get(state, f'from {state}')}" for stage, state in states.items())


def _time_left(spent: float, share: float) -> str:
    return f"{spent:.0f} s, about {spent / share - spent:.0f} s left"


def _plan_table(runs: Sequence[Run], folder: Path) -> Table:
    """Runs down; what happens to each of their stages."""
    states, stages = plan(runs, folder), list(dict.fromkeys(stage for run in runs for stage in run.keys))
    table = Table("run", *stages, "samples to train", title=str(folder), title_justify="left")
    for run in runs:
        told = [states[run.name].get(stage, "–") for stage in stages]
        cells = [state if state in (DONE, TRAIN, "–") else f"from {state}" for state in told]
        table.add_row(run.name, *cells, f"{work(run, states[run.name]):,}")
    return table

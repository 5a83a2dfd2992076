"""Independent jobs of a study, and their results.

A job is one encoder without training, or all runs of a group in sequence. Runs that share any stage
also share the first one, so grouping by the first stage keeps them together, and no job waits for
another.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm2comp.errors import Llm2CompError, one_line
from llm2comp.lab.evaluation.evaluate import NO_EFFECT, EvaluateOptions, evaluate
from llm2comp.lab.report.reading import read_log
from llm2comp.lab.study.grid import DONE, TRAIN, StudyRun, begun, plan, samples_of, work
from llm2comp.lab.study.results import MODEL, TRAINING_FREE, Failure, StudyRow
from llm2comp.lab.train import train
from llm2comp.model.backbone import weights_digest
from llm2comp.recipe import ModelSettings
from llm2comp.runs.folder import DONE_FILE, MODEL_FOLDER, RECIPE_FILE, is_done
from llm2comp.system.files import to_json, write_text

RUNS, SCORES, KEPT = "runs", "scores", "kept"


@dataclass(frozen=True)
class Bench:
    """Folder and evaluation sets of a study.

    `sets`: name → revision; `folders`: where the sets lie.
    """

    folder: Path
    after: tuple[str, ...]
    sets: dict[str, str]
    folders: tuple[Path, ...]

    @property
    def runs(self) -> Path:
        """The folder of all runs."""
        return self.folder / RUNS


@dataclass
class Outcome:
    """Result of one run or untrained encoder: table rows of one seed; `samples` trained on now."""

    name: str
    told: str = ""  # what was done
    samples: int = 0
    is_run: bool = True
    rows: list[StudyRow] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Floor:
    """An encoder that the study scores but does not train.

    `lm`, `digest`: of a training-free one, its LM and `weights_digest` of that.
    """

    name: str
    model: str
    lm: ModelSettings | None = None
    digest: str = ""  # on the Hub, and not known which

    @property
    def stage(self) -> str:
        """As it is called in the table."""
        return MODEL if self.lm is None else TRAINING_FREE

    def outcomes(self, bench: Bench) -> Iterator[Outcome]:
        """Its row."""
        found = Outcome(self.name, is_run=False)
        key = None
        if self.lm and self.digest:
            key = [self.model, self.lm.model_dump(exclude=NO_EFFECT), self.digest]
        scores = _score(bench, found, self.name, self.model, key, self.lm)
        found.told = "scored" if scores else "failed"
        found.rows.append(
            StudyRow(system=self.name, stage=self.stage, base=self.name, scores={0: scores})
        )
        yield found


@dataclass(frozen=True)
class Group:
    """Runs with the same first stage."""

    runs: tuple[StudyRun, ...]

    def outcomes(self, bench: Bench) -> Iterator[Outcome]:
        """Train the missing stages of each run and score its encoders.

        A stage that failed is not tried again.
        """
        states = plan(self.runs, bench.runs)
        dead: dict[str, str] = {}  # key of a stage that could not be trained → why
        for run in self.runs:
            found = Outcome(run.name, _told(states[run.name]), work(run, states[run.name]))
            reason = next(
                (dead[key] for key in run.keys.values() if key in dead), None
            ) or self._train(run, bench)
            if reason is not None:
                found.told = "failed"
                found.failures.append(Failure(system=run.system, run=run.name, reason=reason))
                for stage, key in run.keys.items():
                    place = run.folder(bench.runs, stage)
                    if begun(place, key) and not is_done(place, key):
                        dead[key] = reason
            # models and trainers refer to each other: without it the next run may find no memory
            gc.collect()
            for asked, stage in run.scored(bench.after).items():
                if is_done(run.folder(bench.runs, stage), run.keys[stage]):
                    found.rows.append(_row(bench, found, run, asked, stage))
            yield found

    def _train(self, run: StudyRun, bench: Bench) -> str | None:
        """Train the missing stages of a run. Returns why it failed, or None."""
        folder = bench.runs / run.name
        if _is_finished(run, folder):
            return None
        try:
            train(
                run.recipe,
                folder,
                siblings=[bench.runs / other.name for other in self.runs if other is not run],
            )
        except (Llm2CompError, torch.OutOfMemoryError) as error:
            return one_line(error, 400)
        return None


Job = Floor | Group


def groups(runs: Sequence[StudyRun]) -> list[Group]:
    """Group runs by their first stage, in order of appearance."""
    found: dict[str, list[StudyRun]] = {}
    for run in runs:
        found.setdefault(next(iter(run.keys.values())), []).append(run)
    return [Group(tuple(group)) for group in found.values()]


def floors(training_free: Sequence[str], models: Sequence[str], lm: ModelSettings) -> list[Floor]:
    """Encoders to compare with: training-free ones over `lm`, others that the study names."""
    digest = weights_digest(lm) if training_free else ""
    free = [Floor(name, f"{name}:{lm.name}", lm, digest) for name in training_free]
    return free + [Floor(name, name) for name in models]


def _row(bench: Bench, found: Outcome, run: StudyRun, asked: str, stage: str) -> StudyRow:
    """Table row of one run's encoder after a stage."""
    logs = read_log(bench.runs / run.name, run.name).stages
    trained = logs[: [log.name for log in logs].index(stage) + 1]
    result = trained[-1].result
    # An encoder depends on its stage and on how long a text it reads, which may be a later stage's
    # setting.
    limit = run.recipe.max_tokens or list(run.keys.values())[-1]
    return StudyRow(
        system=run.system,
        stage=asked,
        base=run.base,
        axes=run.axes,
        scores={
            run.seed: _score(
                bench,
                found,
                run.system,
                str(run.folder(bench.runs, stage)),
                [run.keys[stage], limit],
            )
        },
        ranks={run.seed: result.effective_rank} if result else {},
        samples={run.seed: sum(samples_of(log.settings, log.reached) for log in trained)},
    )


def _score(
    bench: Bench,
    found: Outcome,
    system: str,
    model: str,
    key: Any,
    lm: ModelSettings | None = None,
) -> dict[str, float]:
    """Set → percent, for the sets that could be scored.

    `key`: all that the encoder depends on, None where that is not known. `lm`: as `evaluate`.
    """
    digest = hashlib.sha256(to_json([key, bench.sets], sort_keys=True).encode()).hexdigest()
    kept = bench.folder / SCORES / KEPT / f"{digest}.json"
    if key is not None and (before := _read_kept(kept)) is not None:
        return before
    try:
        (row,) = evaluate(
            [model], EvaluateOptions(local=bench.folders, lm=lm), bench.folder / SCORES
        )
    except (Llm2CompError, torch.OutOfMemoryError) as error:
        found.failures.append(Failure(system=system, run=model, reason=one_line(error, 400)))
        return {}
    found.failures += [
        Failure(system=system, run=f"{model}, {task}", reason=why)
        for task, why in row.failed.items()
    ]
    scores = {task: round(100 * result["score"], 4) for task, result in row.scores.items()}
    if key is not None and not row.failed:
        write_text(kept, to_json(scores, indent=1))
    return scores


def _read_kept(file: Path) -> dict[str, float] | None:
    """Scores of an earlier call; None if missing or damaged (then they are computed again)."""
    try:
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None


def _is_finished(run: StudyRun, folder: Path) -> bool:
    """Whether nothing of a run is missing, settings that change no weights included."""
    if not (folder / MODEL_FOLDER / DONE_FILE).is_file():
        return False
    trained = all(is_done(run.folder(folder.parent, stage), key) for stage, key in run.keys.items())
    return trained and (folder / RECIPE_FILE).read_text(encoding="utf-8") == run.recipe.to_yaml()


def _told(states: dict[str, str]) -> str:
    """`pretext from CTKD-seed0, ucl trained`."""
    words = {DONE: "done before", TRAIN: "trained"}
    return ", ".join(
        f"{stage} {words.get(state, f'from {state}')}" for stage, state in states.items()
    )

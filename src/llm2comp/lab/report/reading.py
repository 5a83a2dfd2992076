"""Read and check a run folder; parts that do not exist (yet) are empty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from llm2comp.errors import RunError
from llm2comp.recipe import PretextStage, Recipe, Stage
from llm2comp.runs.folder import DONE_FILE, FOLDERS, Run
from llm2comp.storage.identity import plain_name

T = TypeVar("T")
SEARCHES_FILE, ADAPTED_FILE = "searches.json", "adapted.json"


def _square(matrix: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
    if any(len(row) != len(matrix) for row in matrix):
        raise ValueError(
            f"{len(matrix)} rows of {', '.join(str(len(row)) for row in matrix)} numbers "
            "are no square"
        )
    return matrix


class Line(BaseModel):
    """One line or entry of a run's file; unknown keys of newer versions are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


class Metrics(Line):
    """A line of metrics.jsonl: one optimiser step."""

    step: int
    loss: float
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None


class WatchLine(Line):
    """A line of watch.jsonl: the figures of collapse at one step; tasks in 0 to 1."""

    step: int
    loss: float | None = None
    context_recovered: float | None = None
    effective_rank: float
    participation_ratio: float
    uniformity: float
    alignment: float | None = None
    anisotropy: float
    texts: int
    memory_correlation: Annotated[tuple[tuple[float, ...], ...], AfterValidator(_square)] | None = (
        None
    )
    spectrum: tuple[float, ...] = ()
    tasks: dict[str, float] = {}
    warnings: tuple[str, ...] = ()
    best: bool = False


class Done(Line):
    """done.json of a stage; `kept_step`: the watch's step whose weights it kept, None: the last."""

    steps: int
    seconds: float
    kept_step: int | None = None


class Environment(Line):
    """environment.json: where and how the run was started."""

    python: str
    machine: str
    device: str
    packages: dict[str, str]
    command: tuple[str, ...]
    started: str


class DemoScore(Line):
    """An entry of scores/python-docs.json; figures in 0 to 1."""

    model: str
    ndcg_at_10: float
    mrr_at_10: float
    effective_rank: float | None = None


class SearchHit(Line):
    """What a search found: a name, its first line, its cosine to the question."""

    name: str
    summary: str
    cosine: float


class Search(Line):
    """An entry of scores/searches.json: a question and what was found for it, best first."""

    question: str
    answers: tuple[SearchHit, ...]


class SystemScore(Line):
    """A system on held-out documents: nDCG@10 and its 95 % interval, 0 to 1."""

    system: str
    ndcg_at_10: float
    low: float
    high: float


class Retained(Line):
    """A set that is not of the documents: score before and after, 0 to 1."""

    set: str
    before: float
    after: float


class Adapted(Line):
    """scores/adapted.json: what `adapt` found, and its verdict."""

    documents: str
    queries: int
    passages: int
    rows: tuple[SystemScore, ...]
    sentence: str
    retention: tuple[Retained, ...]


class TaskScore(Line):
    """A task's main score, 0 to 1; `data`: which data, None: an earlier version did not note it."""

    score: float
    metric: str
    split: str
    data: str | None = None


class Evaluation(Line):
    """An entry of scores/summary.json: one model; `failed` says why a task has no score."""

    model: str
    name: str
    revision: str | None = None
    scores: dict[str, TaskScore]
    failed: dict[str, str] = {}

    @property
    def variant(self) -> str:
        """What its name (`identity`) says beyond the label, such as `last-1`; mostly nothing."""
        own, name = plain_name(self.model), self.name.partition("/")[2]
        return name.removeprefix(own).strip("-") if name.startswith(f"{own}-") else ""


def columns(entries: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """Entries by label, and by all that tells two of one label apart."""
    labels = [entry.model + f" ({entry.variant})" * bool(entry.variant) for entry in entries]
    return {
        label if labels.count(label) == 1 else f"{label}, {entry.revision}": entry
        for label, entry in zip(labels, entries, strict=True)
    }


def by_data(entries: dict[str, Evaluation]) -> dict[str, Evaluation]:
    """The same entries; tasks whose data differ between them are told apart by name."""
    known: dict[str, set[str]] = {}
    for entry in entries.values():
        for task, score in entry.scores.items():
            known.setdefault(task, set()).update([score.data] if score.data else [])

    def named(task: str, score: TaskScore) -> str:
        return f"{task}, data {score.data or 'unknown'}" if len(known[task]) > 1 else task

    return {
        label: entry.model_copy(
            update={"scores": {named(task, s): s for task, s in entry.scores.items()}}
        )
        for label, entry in entries.items()
    }


@dataclass(frozen=True)
class StageLog:
    """One stage of a run: its settings and the files it wrote."""

    name: str
    number: int
    settings: Stage
    done: Done | None
    metrics: tuple[Metrics, ...]
    watch: tuple[WatchLine, ...]

    @property
    def title(self) -> str:
        """CTKD, UCL, SCL, or what else stage 1 was trained for."""
        if isinstance(self.settings, PretextStage) and self.settings.objective != "ctkd":
            return self.settings.objective_name
        return {"pretext": "CTKD"}.get(self.name, self.name.upper())

    @property
    def reached(self) -> int:
        """The last step of training, or the last one that is logged."""
        if self.done:
            return self.watch[-1].step if self.watch else self.done.steps
        return max(
            [line.step for line in self.metrics] + [line.step for line in self.watch], default=0
        )

    @property
    def result(self) -> WatchLine | None:
        """The watch at the step whose weights were kept, else the last."""
        kept = [line for line in self.watch if self.done and line.step == self.done.kept_step]
        return next(reversed(kept or self.watch), None)


@dataclass(frozen=True)
class RunLog:
    """One run; `label` tells it from the other runs of a report."""

    label: str
    folder: Path
    recipe: Recipe
    environment: Environment | None
    stages: tuple[StageLog, ...]
    demo: tuple[DemoScore, ...]
    evaluations: tuple[Evaluation, ...]
    searches: tuple[Search, ...] = ()
    adapted: Adapted | None = None


def read_log(folder: Path, label: str) -> RunLog:
    """Read a run folder.

    Raises:
        RunError: not a run, or a damaged file or line, which is named. RecipeError: its recipe.yaml
            is damaged.
    """
    recipe = Run(folder).recipe
    stages = [
        _read_stage(folder / FOLDERS[name], name, stage) for name, stage in recipe.stages.items()
    ]
    return RunLog(
        label,
        folder,
        recipe,
        _read(folder / "environment.json", Environment),
        tuple(stages),
        _read(folder / "scores" / "python-docs.json", tuple[DemoScore, ...]) or (),
        _read(folder / "scores" / "summary.json", tuple[Evaluation, ...]) or (),
        _read(folder / "scores" / SEARCHES_FILE, tuple[Search, ...]) or (),
        _read(folder / "scores" / ADAPTED_FILE, Adapted),
    )


def _read_stage(folder: Path, name: str, settings: Stage) -> StageLog:
    done = _read(folder / DONE_FILE, Done)
    metrics, watch = (
        _lines(folder / "metrics.jsonl", Metrics),
        _lines(folder / "watch.jsonl", WatchLine),
    )
    return StageLog(name, list(FOLDERS).index(name) + 1, settings, done, metrics, watch)


def _read(file: Path, kind: type[T]) -> T | None:
    return _parse(file.read_bytes(), TypeAdapter(kind), str(file)) if file.exists() else None


def _lines(file: Path, kind: type[T]) -> tuple[T, ...]:
    lines = file.read_bytes().splitlines() if file.exists() else []
    adapter = TypeAdapter(kind)
    return tuple(
        _parse(line, adapter, f"{file}, line {number}") for number, line in enumerate(lines, 1)
    )


def _parse(content: bytes, kind: TypeAdapter[T], where: str) -> T:
    try:
        return kind.validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        found = f"{field}: {first['msg']}" if field else first["msg"]
        fix = "mend or delete it; what is missing is left out of the report"
        raise RunError("damaged, cannot be read", where=where, found=found, fix=fix) from None

"""Tasks → scores. Results are kept in mteb's format; finished tasks are not run again."""

from __future__ import annotations

import errno
import hashlib
import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import mteb
import numpy as np
import torch
from mteb.cache import ResultCache

from llm2comp.errors import DataError, Llm2CompError, one_line
from llm2comp.lab.evaluation.lexical import LexicalEncoder
from llm2comp.lab.evaluation.mteb_encoder import MtebEncoder
from llm2comp.lab.evaluation.paper14 import PAPER14
from llm2comp.system.files import explain_disk_errors, to_json

if TYPE_CHECKING:
    from mteb.models import EncoderProtocol

Encoder: TypeAlias = MtebEncoder | LexicalEncoder

FETCH_ADVICE = (
    "check the network, `hf auth login` for a gated set, HF_HUB_OFFLINE; run again: "
    "only what is missing runs"
)

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Score:
    """One task's figure, 0 to 1: mean over splits and subsets; `metric` is mteb's key for it.

    `data` tells the data set's revision and subsets from others.
    """

    task: str
    score: float
    metric: str
    split: str
    data: str


class TaskFailedError(DataError):
    """A task that cannot be run: no data to be had, or more than texts needed (images, ...)."""


@dataclass(frozen=True)
class TaskOutcome:
    """Result of one task: its score, or why there is none.

    `seconds` is 0 if the result existed before.
    """

    task: str
    score: Score | None
    why: str
    seconds: float


def run_tasks(
    encoder: Encoder, tasks: Sequence[Any], results: Path | None
) -> Iterator[TaskOutcome]:
    """Run every task; if one fails, go on with the others.

    Raises:
        DataError: an embedding is not finite. RunError: a result cannot be written.
    """
    for task in tasks:
        begin = time.monotonic()
        try:
            score = run_task(encoder, task, results)
            yield TaskOutcome(score.task, score, "", time.monotonic() - begin)
        except TaskFailedError as error:
            yield TaskOutcome(task.metadata.name, None, str(error), time.monotonic() - begin)


def run_task(encoder: Encoder, task: Any, results: Path | None = None) -> Score:
    """Evaluate one task, or read its result if `results` holds it already.

    A result counts if model, revision and data set are the same.

    Raises:
        TaskFailedError: the data set cannot be fetched, mteb cannot run the task on this model, or
            its score is NaN.
        DataError: an embedding is not finite. RunError: the result cannot be written.
    """
    cache = ResultCache(results) if results else None
    with _quiet():
        found = _kept(cache, encoder, task)
        if found is None:
            given = task.data_loaded
            if not given:
                with _explained(task, "its data cannot be had", FETCH_ADVICE):
                    task.load_data()
            if isinstance(encoder, LexicalEncoder):
                encoder.fit_task(task)
            # A task goes on with its random draws, and each model is to have the same ones.
            task.rng_state, task.np_rng = Random(task.seed), np.random.default_rng(task.seed)
            with (
                explain_disk_errors(results or Path()),
                _explained(task, "mteb cannot score it with this model", None),
            ):
                found = mteb.evaluate(
                    cast("EncoderProtocol", encoder),
                    task,
                    co2_tracker=False,
                    cache=cache,
                    encode_kwargs={"batch_size": encoder.batch_size, "show_progress_bar": False},
                    overwrite_strategy="always",
                    show_progress_bar=False,
                ).task_results[0]
            if not given:
                task.unload_data()
    score = _score(task, found)
    if not math.isfinite(score.score):  # a file of it would hold NaN, which is no JSON
        if cache is not None and encoder.mteb_model_meta is not None:
            cache.get_task_result_path(score.task, encoder.mteb_model_meta).unlink(missing_ok=True)
        problem = "its score is not a number, as when all texts get one embedding"
        raise TaskFailedError(problem, where=score.task, found=f"{score.metric} = {score.score}")
    return score


@contextmanager
def _explained(task: Any, problem: str, fix: str | None) -> Iterator[None]:
    """Turn errors inside mteb into TaskFailedError; our own errors and disk errors pass through."""
    try:
        yield
    except Llm2CompError:
        raise
    except Exception as error:  # the libraries raise some twenty kinds
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
        cause = one_line(f"{type(error).__name__}: {error}")
        raise TaskFailedError(f"{problem}: {cause}", where=task.metadata.name, fix=fix) from error


def _kept(cache: ResultCache | None, encoder: Encoder, task: Any) -> Any:
    """The result of an earlier run, unless its data set was another, or a split or the figure is
    missing, as where the files were of another kind of set.
    """
    if cache is None or encoder.mteb_model_meta is None:
        return None
    try:
        found = cache.load_task_result(task.metadata.name, encoder.mteb_model_meta)
    except ValueError:  # cut off or not one of mteb's: made anew
        return None
    if (
        found is None
        or found.dataset_revision != task.metadata.revision
        or found.get_missing_evaluations(task)
        or any(_metric(task) not in row for rows in found.scores.values() for row in rows)
    ):
        return None
    return found


def _metric(task: Any) -> str:
    name = task.metadata.name
    return PAPER14[name].metric if name in PAPER14 else str(task.metadata.main_score)


def _score(task: Any, result: Any) -> Score:
    name, metric = task.metadata.name, _metric(task)
    rows = [
        row
        for split in task.eval_splits
        for row in result.scores[split]
        if row["hf_subset"] in task.hf_subsets
    ]
    score = sum(float(row[metric]) for row in rows) / len(rows)
    data = to_json([task.metadata.revision, sorted(task.hf_subsets)])
    digest = hashlib.sha256(data.encode()).hexdigest()[:12]
    # as exact as mteb's files
    return Score(name, round(score, 6), metric, "+".join(task.eval_splits), digest)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of mteb and restore the random state that it seeds."""
    logger = logging.getLogger("mteb")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""`llm2comp evaluate`: models × tasks → scores in mteb's format and a summary of them."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llm2comp.errors import DataError
from llm2comp.lab.evaluation.lexical import LEXICAL
from llm2comp.lab.evaluation.mteb_encoder import MtebEncoder
from llm2comp.lab.evaluation.pairs import Questions, pairs_task
from llm2comp.lab.evaluation.paper14 import PAPER14
from llm2comp.lab.evaluation.running import Encoder, run_tasks
from llm2comp.lab.evaluation.summary import (
    SUMMARY_FILE,
    ModelScores,
    keep,
    read_summary,
    results_folder,
)
from llm2comp.lab.evaluation.tasks import local_tasks, named_tasks
from llm2comp.model.backbone import load_backbone, weights_digest
from llm2comp.model.baselines.module import baseline
from llm2comp.model.encoder import MemoryEncoder, check_prompt, merge_adapters
from llm2comp.recipe import ModelSettings
from llm2comp.runs.folder import Run
from llm2comp.storage.golden import GOLDEN_FILE
from llm2comp.storage.identity import identity
from llm2comp.storage.loading import load
from llm2comp.system.console import say
from llm2comp.system.files import to_json

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

NO_EFFECT = {"device", "attention"}  # settings of an LM that change no training-free encoder


@dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate.

    Args:
        tasks: names of tasks and benchmarks of mteb, or `paper14`.
        local: folders of local sets.
        pairs: files of questions and answers.
        instructions: `auto` (the paper's 14 instructions, for models of ours that were trained with
            instructions), `none`, or a YAML file of task names and instructions, which go to any
            model.
        template: how an instruction stands before a text.
        max_tokens_per_batch: tokens at once, padding included; None = by the device.
        device: None = the best there is.
        num_memory: j: the mean of j memory states, as `load`; None = all, by their stored weights.
        lm: how the LM of a training-free model is loaded; None = as its name says.
    """

    tasks: tuple[str, ...] = ()
    local: tuple[Path, ...] = ()
    instructions: str = "auto"
    template: str = "{instruction}:"
    max_tokens_per_batch: int | None = None
    device: str | None = None
    num_memory: int | None = None
    pairs: tuple[Questions, ...] = ()
    lm: ModelSettings | None = None


def evaluate(
    models: Sequence[str], options: EvaluateOptions, out: Path | None = None
) -> list[ModelScores]:
    """Run every task on every model; results that are there already are not run again.

    Args:
        models: whatever `llm2comp.load` takes, `bm25` or `tfidf`.
        options: tasks and how to run them.
        out: folder of the results; default: as `results_folder` says.

    Raises:
        DataError: no task, an unknown one, a malformed local set, an embedding that is not finite.
        ModelFolderError, BackboneError: a model that cannot be loaded.
    """
    tasks = _tasks(options)
    instructions = _instructions(options)
    rows = []
    for path in models:
        folder = results_folder(path, out, models)
        read_summary(folder / SUMMARY_FILE)  # one that is not ours is said before the work
        encoder = _encoder(str(path), tasks, instructions, options)
        row = _evaluate_one(str(path), encoder, tasks, folder)
        keep(folder / SUMMARY_FILE, row)
        rows.append(row)
    for folder in dict.fromkeys(results_folder(path, out, models) for path in models):
        say(f"results: {folder / SUMMARY_FILE}")
    return rows


def _encoder(
    path: str, tasks: Sequence[Any], instructions: Mapping[str, str], options: EvaluateOptions
) -> Encoder:
    """A model as mteb calls it, with the instructions it is to get."""
    if path.lower() in LEXICAL:
        return LEXICAL[path.lower()]()
    model, lm = _loaded(path, options), options.lm
    if options.instructions == "auto" and not _knows_instructions(path, model):
        instructions = {}
    # twice the speed; elsewhere a second copy of a large LM may not fit
    if model.device.type == "cpu":
        merge_adapters(model)
    who = identity(path, model)
    used = {
        task.metadata.name: instructions[task.metadata.name]
        for task in tasks
        if task.metadata.name in instructions
    }
    for task, instruction in used.items():
        check_prompt(
            model,
            options.template.replace("{instruction}", instruction),
            "query",
            where=f"instruction of {task}",
        )
    # One revision per setting that changes scores: results under other instructions or lengths are
    # other results.
    settings = to_json(
        [
            sorted(instructions.items()),
            options.template if instructions else "",
            model.max_seq_length,
            *([lm.model_dump(exclude=NO_EFFECT), weights_digest(lm)] if lm else []),
        ]
    )
    revision = f"{who.revision}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"
    at_once = options.max_tokens_per_batch
    return MtebEncoder(model, who.name, revision, used, options.template, at_once)


def _loaded(path: str, options: EvaluateOptions) -> SentenceTransformer:
    if options.lm is None:
        return load(path, options.device, options.num_memory)
    # A training-free encoder is causal: so its LM need not be one that can attend both ways.
    settings = options.lm.model_copy(update={"attention": "causal"})
    return baseline(load_backbone(settings), path.partition(":")[0])


def _evaluate_one(path: str, encoder: Encoder, tasks: Sequence[Any], folder: Path) -> ModelScores:

    meta = encoder.mteb_model_meta
    name, revision = str(meta and meta.name), str(meta and meta.revision)
    row = ModelScores(_label(path), name, revision)
    told = len(getattr(encoder, "instructions", {}))
    say(
        f"{path}: {name}, revision {revision}, {len(tasks)} tasks"
        + f", {told} of them with an instruction" * bool(told)
    )
    begin = time.monotonic()
    for number, outcome in enumerate(run_tasks(encoder, tasks, folder), 1):
        if outcome.score is None:
            row.failed[outcome.task] = outcome.why
            result = f"left out: {outcome.why}"
        else:
            row.scores[outcome.task] = {
                key: getattr(outcome.score, key) for key in ("score", "metric", "split", "data")
            }
            result = f"{100 * outcome.score.score:.2f} {outcome.score.metric}"
        spent = time.monotonic() - begin
        left = (
            f", about {spent / number * (len(tasks) - number):.0f} s left"
            if number < len(tasks)
            else ""
        )
        say(f"  {number}/{len(tasks)} {outcome.task}: {result} ({outcome.seconds:.0f} s{left})")
    return row


def _tasks(options: EvaluateOptions) -> list[Any]:
    tasks = named_tasks(options.tasks) + [
        task for folder in options.local for task in local_tasks(folder)
    ]
    tasks += [pairs_task(asked) for asked in options.pairs]
    if not tasks:
        raise DataError(
            "nothing to evaluate",
            expected="--tasks paper14, a task of mteb's, --local DIR, or --pairs FILE",
        )
    name, count = Counter(task.metadata.name for task in tasks).most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{count} sets are named {name!r}",
            fix="rename one of them: results are kept by this name",
        )
    return tasks


def _instructions(options: EvaluateOptions) -> dict[str, str]:
    if options.instructions == "none":
        return {}
    if options.instructions == "auto":
        return {task.name: task.instruction for task in PAPER14.values()}
    file = Path(options.instructions)
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"cannot be read: {error}", where=str(file), expected="auto, none, or a YAML file"
        ) from None
    if not isinstance(found, dict) or not all(
        isinstance(text, str) for pair in found.items() for text in pair
    ):
        raise DataError(
            "not a table of instructions",
            where=str(file),
            expected="lines of `task name: instruction`",
        )
    return found


def _knows_instructions(path: str | Path, model: SentenceTransformer) -> bool:
    """Whether a model of ours saw instructions in training: it stores a prompt for queries."""
    folder = Path(path)
    ours = isinstance(model[0], MemoryEncoder) or any(
        (folder / place / GOLDEN_FILE).is_file() for place in ("", "model")
    )
    return ours and bool(model.prompts.get("query"))


def _label(path: str) -> str:
    """Short name for a column: the run, the stage in its run, or what was asked for."""
    run = Run.of(path)
    if run is None:
        return Path(path).name if Path(path).is_dir() else path
    folder, name = Path(path).absolute(), run.path.name
    return name if folder in (run.path, run.model) else f"{name}/{folder.name}"

"""Collapse watch: figures of a fixed sample while a stage trains, warnings in words.

Also the best step kept, and an early stop.

sample   drawn once per run, seeded: texts (collapse), the longer ones split (context recovered),
         pairs (alignment)
watch    every n steps, adapters on, dropout off, randomness put back: nothing that is learned
         changes
file     <stage>/watch.jsonl, a line per watch; the first at step 0, the last at the stage's end
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from llm2comp.data.sources import read_pairs, read_texts
from llm2comp.errors import DataError, RecipeError, RunError
from llm2comp.measures.clusters import copies
from llm2comp.model.compressor import Compressor
from llm2comp.recipe import WATCHED, Recipe, Stage
from llm2comp.system.console import say
from llm2comp.system.files import whole_or_gone
from llm2comp.training.progress import StepLines, TokenCounter
from llm2comp.training.sample import LocalSets, Watch, local_scores

WATCH_FILE, BEST_FOLDER = "watch.jsonl", "best"
RANK_FALL, COPY = 0.7, 0.99


class WatchCallback(TrainerCallback):
    """Watches a stage at its first step, every n, and its last.

    Keeps the best and stops early if the stage asks for it.
    """

    def __init__(
        self,
        watch: Watch,
        compressor: Compressor,
        name: str,
        stage: Stage,
        folder: Path,
        counter: TokenCounter,
    ) -> None:
        self.watch, self.compressor, self.name, self.stage, self.counter = (
            watch,
            compressor,
            name,
            stage,
            counter,
        )
        self.lines, self.best_folder = StepLines(folder / WATCH_FILE), folder / BEST_FOLDER
        self.every = watch.settings.every_steps or max(1, stage.steps // 5)
        self.seen: list[dict[str, Any]] = []
        self.due = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on after the lines of a resumed stage; watch a fresh one before its first step."""
        if state.is_world_process_zero:
            self.seen = self.lines.begin(state.global_step)
        if state.global_step == 0:
            self._look(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """When it is time, have the loss logged first: it belongs to the watch's line.

        Where the best is kept by the loss, it is logged with every checkpoint as well: a logged
        loss is the mean since the one before, and a resumed stage begins it at the checkpoint.
        """
        self.due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        steers = control.should_save and self.stage.keep_best == "loss"
        control.should_log = control.should_log or self.due or steers

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Watch."""
        if self.due:
            self.due = False
            self._look(args, state, control)

    def _look(self, args: Any, state: Any, control: Any) -> None:
        begin = time.monotonic()
        stop = [False]
        if state.is_world_process_zero:
            self._record(state)
            stop = [in_vain(self.seen, self.stage.patience)]
        if args.world_size > 1:
            broadcast_object_list(stop)
        control.should_training_stop = control.should_training_stop or stop[0]
        self.counter.leave_out(time.monotonic() - begin)

    def _record(self, state: Any) -> None:
        logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
        line = {
            "step": state.global_step,
            "loss": logged[-1] if logged and state.global_step else None,
        }
        try:
            line |= self.watch.measure(self.compressor, prompt=self.name == "scl")
        except DataError as error:
            raise RunError(
                f"the watch found that {error.problem}",
                where=f"{self.name}, step {state.global_step}",
                found=error.found,
                fix=f"lower {self.name}.schedule.learning_rate or set precision: float32, in "
                "a new run directory",
            ) from error
        line["warnings"] = warnings_of(
            self.seen[0] if self.seen else line, line, compresses=self.name == "pretext"
        )
        line["best"] = self._is_best(line)
        told = {text.split(":")[0] for old in self.seen for text in old["warnings"]}
        for text in line["warnings"]:
            if text.split(":")[0] not in told:
                say(f"warning, {self.name} step {line['step']}: {text}")
        if line["best"]:
            with whole_or_gone(self.best_folder):
                shutil.rmtree(self.best_folder, ignore_errors=True)
                self.compressor.save(self.best_folder, self.name)
        self.seen.append(line)
        self.lines.add(line)

    def _is_best(self, line: dict[str, Any]) -> bool:
        figure = self.stage.keep_best
        if figure is None or (value := figure_of(line, figure)) is None:
            return False
        before = [found for old in self.seen if (found := figure_of(old, figure)) is not None]
        higher = WATCHED.get(figure, True)
        return not before or (value > max(before) if higher else value < min(before))


def keep_best(compressor: Compressor, name: str, folder: Path) -> int | None:
    """Put the best step's adapter and memory back, if one was kept. Returns the step.

    They stay in the folder until the stage is called done: a stop before that asks for them again.
    """
    best = folder / BEST_FOLDER
    if not best.is_dir():
        return None
    compressor.load(best, name)
    lines = StepLines(folder / WATCH_FILE).read()
    PartialState().wait_for_everyone()  # rank 0 removes it once the stage is done
    step: int = [line["step"] for line in lines if line["best"]][-1]
    say(f"{name}: keeping step {step}, the best of {len(lines)} watches")
    return step


def in_vain(lines: Sequence[dict[str, Any]], patience: int | None) -> bool:
    """Whether the last `patience` watches brought nothing better."""
    return (
        patience is not None
        and len(lines) > patience
        and not any(line["best"] for line in lines[-patience:])
    )


def ended(stage: Stage, folder: Path, step: int) -> bool:
    """Whether a stage's training ended with this step, at its length or in vain."""
    lines = StepLines(folder / WATCH_FILE).read()
    early = in_vain(lines, stage.patience) and lines[-1]["step"] == step
    return step >= stage.steps or early


def figure_of(line: dict[str, Any], figure: str) -> float | None:
    """A figure of a watch by its name, or the score of a local set."""
    value: float | None = line[figure] if figure in WATCHED else line["tasks"].get(figure)
    return value


def warnings_of(first: dict[str, Any], now: dict[str, Any], compresses: bool) -> list[str]:
    """What a watch has to say in words, against the stage's first one.

    `compresses`: the stage learns to continue.
    """
    found = []
    before, rank = first["effective_rank"], now["effective_rank"]
    if rank < RANK_FALL * before:
        found.append(
            f"the effective rank falls: {before:.1f} at step {first['step']}, now "
            f"{rank:.1f}; the embeddings collapse into "
            "fewer directions (a lower learning rate, fewer steps, or a contrastive stage helps)"
        )
    correlation = now["memory_correlation"]  # None: an encoder without memory tokens
    if correlation and (count := copies(correlation, COPY)):
        found.append(
            f"memory tokens become copies: {count} of {len(correlation)} give nearly what another "
            f"gives (mean cosine {COPY} or more); fewer tokens, or merging (`llm2comp analyze "
            "--write-weights`), would do as well"
        )
    recovered = now["context_recovered"]
    if compresses and now["step"] and recovered is not None and recovered < 0:
        found.append(
            "the memory misleads: the LM continues worse with it than without any "
            f"context ({recovered:.2f})"
        )
    return found


def check_watch(recipe: Recipe, local_sets: LocalSets | None = None) -> None:
    """Find what a watch would stumble over before anything trains.

    Raises:
        DataError: a source or a folder of sets cannot be read. RecipeError: `keep_best` names
            nothing that is watched.
    """
    if recipe.watch is None:
        return
    for texts in recipe.watch.data:
        read_texts(texts.model_copy(update={"limit": 1}))
    for pairs in recipe.watch.pairs:
        read_pairs(pairs.model_copy(update={"limit": 1}))
    scores = local_scores(recipe.watch, local_sets)
    names = scores.names if scores else ()
    for name, stage in recipe.stages.items():
        if stage.keep_best is not None and stage.keep_best not in (*WATCHED, *names):
            raise RecipeError(
                "no such figure",
                where=f"{name}.keep_best",
                expected=", ".join((*WATCHED, *names)),
                found=stage.keep_best,
            )

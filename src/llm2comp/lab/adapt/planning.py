"""Minutes → a plan: what training gets when scoring has its share, and how many steps that is."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llm2comp.errors import RecipeError
from llm2comp.lab.adapt.corpus import (
    DATA_FOLDER,
    PAIRS_FILE,
    PASSAGE_TOKENS,
    PASSAGES_FILE,
    TRAINED_TOKENS,
    VALIDATING,
)
from llm2comp.recipe import Recipe, parse_recipe

BATCH, PRETEXT_BATCH = 32, 8
# Of the minutes: embedding the held-out passages once, and one look at those that choose.
SCORING, LOOKING = 0.06, 0.015
# Of what is left to train in: stage 1, and writing questions, where they are asked for.
PRETEXT, WRITING = 1 / 3, 1 / 3
LOOKS = 4  # at step 0, two between, and the last
LEAST_STEPS = 3
TRIED, TRIED_PAIRS = 2, 8  # steps and the pairs in each, to learn what a pair costs
EPOCHS = 3  # how often a pair is seen at most
# What a text of TRAINED_TOKENS needs beside its own tokens: BOS.
_BOS = 1


@dataclass
class Clock:
    """Seconds since the work began, and what each part of it took."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is done inside as this part."""
        begin = time.monotonic()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - begin

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.monotonic() - self.began)


@dataclass(frozen=True)
class Plan:
    """How training spends its share.

    Args:
        steps: optimiser steps.
        batch: pairs in each.
        per_step: seconds, measured.
        after: seconds kept for what comes beside and after training.
        pretext: steps of stage 1 before them.
        per_pretext: seconds of one, measured.
    """

    steps: int
    batch: int
    per_step: float = 0.0
    after: float = 0.0
    pretext: int = 0
    per_pretext: float = 0.0

    @classmethod
    def of(cls, left: float, after: float, per_step: float, batch: int) -> Plan:
        """As many steps as fit.

        Raises:
            RecipeError: hardly one fits; says how many minutes would do.
        """
        steps = int((left - after) / per_step)
        if steps < LEAST_STEPS:
            lacking = LEAST_STEPS * per_step + after - left
            raise RecipeError(
                "too short on this machine",
                where="--minutes",
                expected=f"at least {math.ceil(lacking / 60)} more",
                found=f"{per_step:.1f} s for a step of {batch} pairs, {after:.0f} s for scoring",
                fix="give more minutes, or train on a GPU",
            )
        return cls(steps, batch, per_step, after)

    def begun_with(self, per_pretext: float, most: int) -> Plan:
        """The plan with a share of its time for stage 1, and no more steps of that."""
        pretext = min(most, int(PRETEXT * self.steps * self.per_step / per_pretext))
        steps = self.steps - round(pretext * per_pretext / self.per_step)
        return replace(
            self, steps=max(LEAST_STEPS, steps), pretext=pretext, per_pretext=per_pretext
        )

    def over(self, pairs: int) -> Plan:
        """The plan over so many pairs, none of which is seen more than EPOCHS times."""
        batch = min(self.batch, pairs)
        return replace(self, steps=min(self.steps, EPOCHS * pairs // batch), batch=batch)

    def told(self, minutes: float) -> str:
        """The plan as one line."""
        trained = self.steps * self.per_step / 60
        begin = f"{self.pretext} steps of {PRETEXT_BATCH} passages in stage 1, "
        return (
            f"plan for {minutes:g} minutes: {begin if self.pretext else ''}"
            f"{self.steps} steps of {self.batch} pairs "
            f"({self.per_step:.1f} s each, measured: {trained:.1f} min), then "
            f"{self.after / 60:.1f} min of scoring and writing"
        )


@dataclass(frozen=True)
class Wanted:
    """What an adaptation is asked for, beside its documents.

    Args:
        model: the encoder to start from, or a causal LM.
        start: whether it is an encoder.
        minutes: for everything.
        negatives: mined hard negatives of each pair.
        guide: whether the encoder takes false negatives out of the batches.
        questions: whether the LM writes questions about the passages.
        pretext: whether stage 1 reads the passages first.
        device: of training and scoring; None: the best there is.
        seed: of what is drawn.
        retention: folders of local sets that must not get worse.
    """

    model: str
    start: bool
    minutes: float
    negatives: int
    guide: bool
    questions: bool
    pretext: bool
    device: str | None
    seed: int
    retention: tuple[str, ...]


def recipe_of(
    wanted: Wanted,
    run: Path,
    plan: Plan,
    longest: int,
    guide: str | None,
    data: Path | None = None,
) -> Recipe:
    """The recipe of a plan: SCL over the start, the checkpoint chosen by the validation.

    `longest`: tokens of a text that the encoder reads. `data`: where pairs and passages lie.
    """
    data, steps = (data or run / DATA_FOLDER).absolute(), plan.steps
    columns = [f"negative_{n}" for n in range(1, wanted.negatives + 1)]
    begin: dict[str, Any] = (
        {"start_from": wanted.model, "model": {}}
        if wanted.start
        else {"model": {"name": wanted.model}}
    )
    begin["model"] |= {"device": wanted.device} if wanted.device else {}
    scl = {
        "data": [{"source": str(data / PAIRS_FILE), "negatives": columns}],
        "steps": steps,
        "batch_size": plan.batch,
        "schedule": _down_to_nothing(steps),
        "query_max_tokens": TRAINED_TOKENS + _BOS,
        "document_max_tokens": TRAINED_TOKENS + _BOS,
        "train_memory": True,
        "log_every_steps": 1,
        "keep_best": f"Local-{VALIDATING}",
        "guide": None if guide is None else {"name": guide},
    }
    watch = {
        "every_steps": max(1, steps // (LOOKS - 1)),
        "texts": 32,
        "max_tokens": 48,
        "tasks": [str((run / DATA_FOLDER / VALIDATING).absolute())],
    }
    pretext = {
        "data": [{"source": str(data / PASSAGES_FILE)}],
        "steps": plan.pretext,
        "batch_size": PRETEXT_BATCH,
        "min_characters": 0,
        "max_tokens": PASSAGE_TOKENS + _BOS,
        "long_texts": "truncate",
        "schedule": _down_to_nothing(plan.pretext),
    }
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.absolute().name).lstrip("._-") or "adapted"
    head = {"format_version": 1, "name": name, "seed": wanted.seed, "max_tokens": longest}
    # So few steps over so few pairs need no dropout, which costs a fifth of a step on a CPU.
    begin["adapter"] = {"dropout": 0.0}
    stages = ({"pretext": pretext} if plan.pretext else {}) | {"scl": scl}
    return parse_recipe(head | begin | stages | {"watch": watch})


def _down_to_nothing(steps: int) -> dict[str, Any]:
    return {
        "floor_learning_rate": 0,
        "warmup_steps": max(1, steps // 10),
        "warmup": "linear",
        "total_steps": steps,
    }


def told_of(parts: Mapping[str, float]) -> str:
    """For people: `scoring 42 s, training 301 s`."""
    return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())

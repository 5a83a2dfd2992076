"""Minutes → a plan: what training gets when scoring has its share, and how many steps that is."""

from __future__ import annotations

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
    TRAINED_TOKENS,
    VALIDATING,
)
from llm2comp.recipe import Recipe, parse_recipe

BATCH = 32
# Of the minutes: embedding the held-out passages once, and one look at those that choose.
SCORING, LOOKING = 0.06, 0.015
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
    """

    steps: int
    batch: int
    per_step: float
    after: float

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
                expected=f"{lacking / 60:.0f} minutes more, or above",
                found=f"{per_step:.1f} s for a step of {batch} pairs, {after:.0f} s for scoring",
                fix="give more minutes, or train on a GPU",
            )
        return cls(steps, batch, per_step, after)

    def at_most(self, steps: int) -> Plan:
        """The plan with no more steps than that: there is little to learn from."""
        return replace(self, steps=max(LEAST_STEPS, min(self.steps, steps)))

    def told(self, minutes: float) -> str:
        """The plan as one line."""
        trained = self.steps * self.per_step / 60
        return (
            f"plan for {minutes:g} minutes: {self.steps} steps of {self.batch} pairs "
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
        device: of training and scoring; None: the best there is.
        seed: of what is drawn.
        retention: folders of local sets that must not get worse.
    """

    model: str
    start: bool
    minutes: float
    negatives: int
    guide: bool
    device: str | None
    seed: int
    retention: tuple[str, ...]


def recipe_of(
    wanted: Wanted,
    run: Path,
    steps: int,
    batch: int,
    longest: int,
    guide: str | None,
    pairs: Path | None = None,
) -> Recipe:
    """The recipe of so many steps: SCL over the start, the checkpoint chosen by the validation.

    `longest`: tokens of a text that the encoder reads.
    """
    data = run / DATA_FOLDER
    columns = [f"negative_{n}" for n in range(1, wanted.negatives + 1)]
    begin: dict[str, Any] = (
        {"start_from": wanted.model, "model": {}}
        if wanted.start
        else {"model": {"name": wanted.model}}
    )
    begin["model"] |= {"device": wanted.device} if wanted.device else {}
    scl = {
        "data": [{"source": str((pairs or data / PAIRS_FILE).absolute()), "negatives": columns}],
        "steps": steps,
        "batch_size": batch,
        "schedule": {
            "floor_learning_rate": 0,
            "warmup_steps": max(1, steps // 10),
            "warmup": "linear",
            "total_steps": steps,
        },
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
        "tasks": [str((data / VALIDATING).absolute())],
    }
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", run.absolute().name).lstrip("._-") or "adapted"
    head = {"format_version": 1, "name": name, "seed": wanted.seed, "max_tokens": longest}
    return parse_recipe(head | begin | {"scl": scl, "watch": watch})


def told_of(parts: Mapping[str, float]) -> str:
    """For people: `scoring 42 s, training 301 s`."""
    return ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())

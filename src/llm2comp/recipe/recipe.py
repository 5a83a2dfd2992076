"""A recipe as one frozen, validated model.

Defaults are the release's settings except where docs/method.md lists a deviation. Every `*_tokens`
counts text tokens with BOS and without memory tokens, every `*_steps` optimiser steps.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from llm2comp.recipe.contrastive_stages import SclStage, UclStage
from llm2comp.recipe.parts import (
    AdapterSettings,
    EncoderSettings,
    MemorySettings,
    ModelSettings,
    Section,
    WatchSettings,
)
from llm2comp.recipe.paths import LocalName
from llm2comp.recipe.pretext_stage import PretextStage
from llm2comp.recipe.stages import Stage
from llm2comp.recipe.starting import inherit

FORMAT_VERSION = 1
# Figures of the watch that a stage may be steered by, and whether a higher one is better.
WATCHED = {
    "loss": False,
    "context_recovered": True,
    "effective_rank": True,
    "participation_ratio": True,
    "uniformity": False,
    "alignment": False,
    "anisotropy": False,
}


class Recipe(Section):
    """One experiment."""

    format_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    start_from: LocalName | None = Field(
        default=None,
        description="the encoder whose adapters this run's lie over: `builtin:general`, a run, or "
        "a stage of one; LM, memory, pooling, max_tokens and instruction are its own where not set",
    )
    model: ModelSettings
    memory: MemorySettings = MemorySettings()
    encoder: EncoderSettings = EncoderSettings()
    adapter: AdapterSettings = AdapterSettings()
    pretext: PretextStage | None = None
    ucl: UclStage | None = None
    scl: SclStage | None = None
    watch: WatchSettings | None = Field(
        default=WatchSettings(), description="null = no collapse watch"
    )
    max_tokens: Annotated[int, Field(ge=4)] | None = Field(
        default=None,
        description="longest text that the finished encoder reads; null = as long as its last "
        "stage's",
    )
    report_to: tuple[str, ...] = Field(
        default=(), description="the trainers' own loggers: tensorboard, wandb, ..."
    )

    @property
    def memory_tokens(self) -> int:
        """k; 0 where the text's own states are pooled."""
        return self.memory.tokens if self.encoder.pooling == "memory" else 0

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, data: Any) -> Any:
        return inherit(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _has_a_stage(self) -> Recipe:
        if not self.stages:
            raise ValueError("a recipe needs at least one of pretext, ucl, scl")
        return self

    @model_validator(mode="after")
    def _memory_is_there(self) -> Recipe:
        unused = [name for name in ("nested", "start_as") if getattr(self.memory, name)]
        if not self.memory_tokens and unused:
            raise ValueError(
                f"memory.{unused[0]} is for encoder.pooling memory, found {self.encoder.pooling}"
            )
        return self

    @model_validator(mode="after")
    def _full_over_full(self) -> Recipe:
        if self.adapter.kind == "full" and self.model.quantization:
            raise ValueError(
                f"adapter.kind full cannot train {self.model.quantization} weights: set "
                "lora, or no quantization"
            )
        return self

    @model_validator(mode="after")
    def _something_learns(self) -> Recipe:
        for name, stage in self.stages.items() if self.adapter.kind == "none" else ():
            pretext = isinstance(stage, PretextStage)
            memory = "memory" in stage.needs if pretext else stage.train_memory  # type: ignore[attr-defined]
            table = stage.train_embeddings in (True, "all")  # type: ignore[attr-defined]
            if not (table or (memory and self.memory_tokens)):
                fix = (
                    "an objective from memory, encoder.pooling: memory"
                    if pretext
                    else f"{name}.train_memory: true"
                )
                raise ValueError(f"nothing learns in {name}, as adapter.kind is none: set {fix}")
        return self

    @model_validator(mode="after")
    def _something_to_keep_by(self) -> Recipe:
        tasks = self.watch.tasks if self.watch else ()
        for name, stage in self.stages.items():
            if stage.keep_best is None:
                continue
            if self.watch is None:
                raise ValueError(
                    f"{name}.keep_best {stage.keep_best!r} needs the watch, which is null"
                )
            if stage.keep_best not in WATCHED and not tasks:
                raise ValueError(
                    f"{name}.keep_best {stage.keep_best!r} is not one of "
                    f"{', '.join(WATCHED)}, and watch.tasks names no set"
                )
        return self

    @model_validator(mode="after")
    def _stage_1_to_keep(self) -> Recipe:
        if self.scl is None or not self.scl.pretext_weight:
            return self
        weight = f"scl.pretext_weight {self.scl.pretext_weight:g}"
        if self.pretext is None:
            raise ValueError(f"{weight} needs a pretext section: its data and its objective")
        if "alignment" in self.pretext.objectives:
            raise ValueError(
                f"{weight} does not go with pretext.objective alignment: its map to the "
                "teacher stays in stage 1"
            )
        return self

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages that this recipe runs, in order."""
        named = {"pretext": self.pretext, "ucl": self.ucl, "scl": self.scl}
        return {name: stage for name, stage in named.items() if stage is not None}

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

"""The settings of a recipe as frozen models that know their limits.

Defaults are the release's settings (METHOD: stage 1, UCL, SCL) except where docs/method.md lists a deviation.
Every `*_tokens` counts text tokens with BOS and without memory tokens, every `*_steps` optimiser steps.
"""

from __future__ import annotations

from typing import Annotated, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from llm2comp.recipe.parts import (
    AdapterSettings,
    MemorySettings,
    ModelSettings,
    PairData,
    Schedule,
    Section,
    Share,
    Steps,
    TextData,
    WatchSettings,
)

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

Objective = Literal["ctkd", "continuation", "reconstruction"]


class Stage(Section):
    """What all three stages share."""

    steps: Steps
    batch_size: Annotated[int, Field(ge=1)] = Field(description="samples per optimiser step and device")
    schedule: Schedule
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(default=None, description="null = no clipping")
    attention_dropout: Share = Field(default=0.0, description="in the encoder pass only")
    adapter_dropout: Share | None = Field(default=None, description="null = adapter.dropout")
    precision: Literal["float32", "bfloat16"] = Field(default="float32", description="autocast of the training step")
    gradient_checkpointing: bool = False
    log_every_steps: Steps = 10
    save_every_steps: Steps | None = Field(default=None, description="checkpoint for resume; null = ten per stage")
    workers: Annotated[int, Field(ge=0)] = Field(default=0, description="processes that prepare batches")
    keep_best: str | None = Field(
        default=None,
        description="keep the step of the watch where this figure was best instead of the last: one of WATCHED, or the name "
        "of a local evaluation set of watch.tasks",
    )
    patience: Steps | None = Field(default=None, description="stop after so many watches without a better keep_best")

    @model_validator(mode="after")
    def _patience_for_something(self) -> Stage:
        if self.patience is not None and self.keep_best is None:
            raise ValueError(f"patience {self.patience} waits for nothing: set keep_best to the figure that is to improve")
        return self


class PretextStage(Stage):
    """Stage 1, context compression (METHOD 2)."""

    data: tuple[TextData, ...] = Field(min_length=1)
    objective: Objective | dict[Objective, Annotated[float, Field(gt=0)]] = Field(
        default="ctkd",
        description="continuation = the paper's NLL, reconstruction = its RC (of the context); or several with their weights",
    )
    steps: Steps = 32_000
    batch_size: Annotated[int, Field(ge=1)] = 4
    gradient_accumulation_steps: Steps = 1
    schedule: Schedule = Schedule(learning_rate=1e-4, warmup_steps=3200)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 2.0
    min_characters: Annotated[int, Field(ge=0)] = Field(default=1000, description="shorter texts are left out")
    max_tokens: Annotated[int, Field(ge=4)] = Field(default=512, description="length limit of a text")
    long_texts: Literal["skip", "truncate", "chunk"] = Field(
        default="skip", description="texts over max_tokens: left out, cut, or cut into several"
    )
    group_by_length: bool = Field(default=True, description="texts of like length share a batch; less padding")
    site_margin_tokens: Annotated[int, Field(ge=1)] = Field(
        default=10, description="split site uniform in [margin, L − margin]"
    )
    position_weighting: Literal["sample_mean", "token_mean"] | None = Field(
        default=None, description="null = as released: sample_mean for ctkd, token_mean for the others"
    )
    train_embeddings: Literal["memory", "all"] = Field(
        default="memory", description="all = also the encoder's own copy of the embedding table, as the release does"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="of both distributions in the KL")

    @field_validator("objective")
    @classmethod
    def _one_at_least(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if not value:
            raise ValueError("objective names nothing to learn")
        return value

    @property
    def objectives(self) -> dict[str, float]:
        """Weight by objective, in a fixed order."""
        return {self.objective: 1.0} if isinstance(self.objective, str) else dict(sorted(self.objective.items()))

    @property
    def objective_name(self) -> str:
        """For people: `ctkd`, or `1 ctkd + 0.1 reconstruction`."""
        if isinstance(self.objective, str):
            return self.objective
        return " + ".join(f"{weight:g} {name}" for name, weight in self.objectives.items())

    @model_validator(mode="after")
    def _site_possible(self) -> PretextStage:
        if 2 * self.site_margin_tokens > self.max_tokens:
            raise ValueError(
                f"no split site exists: site_margin_tokens {self.site_margin_tokens} on both sides needs texts of at least "
                f"{2 * self.site_margin_tokens} tokens, max_tokens is {self.max_tokens}"
            )
        return self


class ContrastiveStage(Stage):
    """What UCL and SCL share."""

    temperature: Annotated[float, Field(gt=0)] = 0.05
    train_memory: bool = Field(default=False, description="whether the memory tokens go on learning")
    train_embeddings: bool = Field(default=False, description="also the encoder's own copy of the embedding table")
    matryoshka_dims: tuple[Steps, ...] = Field(default=(), description="the loss also on so many first dimensions, summed")
    mini_batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="texts encoded at once; the gradient of the whole batch is kept (GradCache)"
    )


class UclStage(ContrastiveStage):
    """Stage 2, unsupervised contrastive learning (SimCSE)."""

    data: tuple[TextData, ...] = Field(min_length=1)
    steps: Steps = 1000
    batch_size: Annotated[int, Field(ge=2)] = 128
    schedule: Schedule = Schedule(learning_rate=3e-5, warmup_steps=100)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    attention_dropout: Share = 0.2
    min_characters: Annotated[int, Field(ge=0)] = 20
    max_tokens: Annotated[int, Field(ge=4)] = Field(default=512, description="longer texts are cut")
    denominator: Literal["second_views", "both_views"] = Field(
        default="second_views", description="B second views (release) or also the B first views (poster)"
    )


class SclStage(ContrastiveStage):
    """Stage 3, supervised contrastive learning."""

    data: tuple[PairData, ...] = Field(min_length=1)
    steps: Steps = 200
    batch_size: Annotated[int, Field(ge=2)] = 1024
    schedule: Schedule = Schedule(learning_rate=1e-4, warmup_steps=200, total_steps=2000)
    weight_decay: Annotated[float, Field(ge=0)] = 3e-4
    query_max_tokens: Annotated[int, Field(ge=4)] = Field(default=512, description="longer queries are cut")
    document_max_tokens: Annotated[int, Field(ge=4)] = Field(default=1024, description="longer documents are cut")
    query_prompt: str = Field(
        default="{instruction}:", description="put before a query that has an instruction; stored in the model"
    )
    query_suffix: str = Field(
        default="", description='put after such a query ("\\n" in the release); a stored prompt cannot carry it'
    )

    @field_validator("query_prompt")
    @classmethod
    def _names_instruction(cls, value: str) -> str:
        if "{instruction}" not in value:
            raise ValueError("query_prompt must contain {instruction}")
        return value

    def prompt_of(self, spec: PairData) -> str:
        """What stands before the queries of one source."""
        return self.query_prompt.replace("{instruction}", spec.instruction) if spec.instruction else ""


class Recipe(Section):
    """One experiment."""

    format_version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelSettings
    memory: MemorySettings = MemorySettings()
    adapter: AdapterSettings = AdapterSettings()
    pretext: PretextStage | None = None
    ucl: UclStage | None = None
    scl: SclStage | None = None
    watch: WatchSettings | None = Field(default=WatchSettings(), description="null = no collapse watch")
    max_tokens: Annotated[int, Field(ge=4)] | None = Field(
        default=None, description="longest text that the finished encoder reads; null = as long as its last stage's"
    )
    report_to: tuple[str, ...] = Field(default=(), description="the trainers' own loggers: tensorboard, wandb, ...")

    @model_validator(mode="after")
    def _has_a_stage(self) -> Recipe:
        if not self.stages:
            raise ValueError("a recipe needs at least one of pretext, ucl, scl")
        return self

    @model_validator(mode="after")
    def _something_to_keep_by(self) -> Recipe:
        tasks = self.watch.tasks if self.watch else ()
        for name, stage in self.stages.items():
            if stage.keep_best is None:
                continue
            if self.watch is None:
                raise ValueError(f"{name}.keep_best {stage.keep_best!r} needs the watch, which is null")
            if stage.keep_best not in WATCHED and not tasks:
                raise ValueError(
                    f"{name}.keep_best {stage.keep_best!r} is not one of {', '.join(WATCHED)}, and watch.tasks names no set"
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

"""The settings of a recipe as frozen models that know their limits.

Defaults are the release's settings (METHOD: stage 1, UCL, SCL) except where docs/method.md lists a deviation.
Every `*_tokens` counts text tokens with BOS and without memory tokens, every `*_steps` optimiser steps.
"""

from __future__ import annotations

from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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

Steps = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of a recipe: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSettings(Section):
    """Which causal LM, and how to run it."""

    name: str = Field(description="Hub id, local folder, or `builtin:tiny`")
    revision: str | None = Field(
        default=None, description="Hub branch, tag or commit; a token comes from HF_TOKEN or `hf auth login`"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype of the frozen base; auto = float32 on a CPU, bfloat16 elsewhere"
    )
    attention: Literal["bidirectional", "causal"] = Field(default="bidirectional", description="attention of the encoder pass")
    attention_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None, description="null = the family's default"
    )
    device: str = Field(default="auto", description="auto = cuda, else mps, else cpu")


class MemorySettings(Section):
    """The learned memory tokens."""

    tokens: Annotated[int, Field(ge=1, le=512)] = Field(default=8, description="k, number of memory tokens")


class AdapterSettings(Section):
    """What learns: LoRA, each stage adding one such adapter, or a whole copy of the LM."""

    kind: Literal["lora", "full"] = Field(
        default="lora",
        description="full = all layers of a separate, trained copy of the LM encode (the rest here is unused)",
    )
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Share = 0.05
    targets: Literal["default", "all-linear"] | tuple[str, ...] = Field(
        default="default", description="default = the family's q, v, o, gate, up, down (not k); or module names"
    )


class TextData(Section):
    """Texts: a builtin, a file, or a Hub data set."""

    source: str = Field(description="`builtin:python-docs`, a jsonl/csv/parquet/txt file (also .gz, .zst), or a Hub data set")
    column: str = Field(default="text", description="column that holds the text (ignored for .txt: a line is a text)")
    subset: str | None = Field(default=None, description="Hub data set: configuration name")
    split: str = Field(default="train", description="Hub data set: split")
    file: str | None = Field(default=None, description="Hub data set: one file of its repository, read as a local one is")
    revision: str | None = Field(default=None, description="Hub data set: branch, tag or commit")
    limit: Annotated[int, Field(ge=1)] | None = Field(default=None, description="use at most so many rows")


class PairData(Section):
    """Training pairs for SCL, with the instruction their queries carry."""

    source: str = Field(description="as for texts")
    anchor: str = Field(default="anchor", description="column of the query")
    positive: str = Field(default="positive", description="column of the text to be found")
    negatives: tuple[str, ...] = Field(
        default=(), description="columns of hard negatives; a column may hold one text or a list of texts"
    )
    instruction: str | None = Field(default=None, description="put before each query through scl.query_prompt")
    subset: str | None = None
    split: str = "train"
    file: str | None = None
    revision: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class Schedule(Section):
    """Learning rate: warm-up from the floor, then decay to the floor (DeepSpeed's WarmupDecayLR in the release)."""

    learning_rate: Annotated[float, Field(gt=0)]
    floor_learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    warmup: Literal["logarithmic", "linear"] = "logarithmic"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["linear", "constant"] = "linear"
    total_steps: Steps | None = Field(default=None, description="length of the schedule; null = the stage's steps")

    @model_validator(mode="after")
    def _floor_below_peak(self) -> Schedule:
        if self.floor_learning_rate > self.learning_rate:
            raise ValueError(f"floor_learning_rate {self.floor_learning_rate} is above learning_rate {self.learning_rate}")
        return self


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


class WatchSettings(Section):
    """Collapse watch: figures of a fixed sample of texts while a stage trains (METHOD 4). Changes nothing that is learned."""

    every_steps: Steps | None = Field(default=None, description="steps from one watch to the next; null = five per stage")
    texts: Annotated[int, Field(ge=8)] = Field(default=256, description="texts in the sample, and pairs for the alignment")
    max_tokens: Annotated[int, Field(ge=16)] = Field(default=256, description="longer texts of the sample are cut")
    data: tuple[TextData, ...] = Field(default=(), description="where the sample is drawn; empty = the first stage's texts")
    pairs: tuple[PairData, ...] = Field(default=(), description="pairs for the alignment; empty = those of scl, if any")
    tasks: tuple[str, ...] = Field(default=(), description="folders of local evaluation sets, scored at every watch")


class PretextStage(Stage):
    """Stage 1, context compression (METHOD 2)."""

    data: tuple[TextData, ...] = Field(min_length=1)
    objective: Literal["ctkd", "continuation"] = Field(default="ctkd", description="continuation = the paper's NLL")
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
        default=None, description="null = as released: sample_mean for ctkd, token_mean for continuation"
    )
    train_embeddings: Literal["memory", "all"] = Field(
        default="memory", description="all = also the encoder's own copy of the embedding table, as the release does"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(default=1.0, description="of both distributions in the KL")

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

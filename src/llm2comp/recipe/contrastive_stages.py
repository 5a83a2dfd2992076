"""Stages 2 and 3 of a recipe: contrastive learning without and with labels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from llm2comp.recipe.parts import (
    GuideSettings,
    JudgeSettings,
    PairData,
    Schedule,
    Share,
    Steps,
    TeacherSettings,
    TextData,
)
from llm2comp.recipe.stages import Stage


class ContrastiveStage(Stage):
    """What UCL and SCL share."""

    temperature: Annotated[float, Field(gt=0)] = 0.05
    train_memory: bool = Field(
        default=False, description="whether the memory tokens go on learning"
    )
    train_embeddings: bool = Field(
        default=False, description="also the encoder's own copy of the embedding table"
    )
    matryoshka_dims: tuple[Steps, ...] = Field(
        default=(), description="the loss also on so many first dimensions, summed"
    )
    mini_batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="texts encoded at once; the gradient of the whole batch is kept (GradCache)",
    )
    mini_batch_tokens: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="the same by tokens, padding not counted, but one text at least; with it, "
        "mini_batch_size only says how many rows of the table of scores are computed at once; "
        "both null = the whole batch, or what fits the memory",
    )


CropShare = Annotated[float, Field(gt=0, le=1)]


class UclStage(ContrastiveStage):
    """Stage 2, unsupervised contrastive learning: two views of each text (SimCSE, or crops)."""

    released_rate: ClassVar[float] = 3e-5

    data: tuple[TextData, ...] = Field(min_length=1)
    steps: Steps = 1000
    batch_size: Annotated[int, Field(ge=2)] = 128
    schedule: Schedule = Schedule(warmup_steps=100)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    attention_dropout: Share = 0.2
    min_characters: Annotated[int, Field(ge=0)] = 20
    max_tokens: Annotated[int, Field(ge=4)] = Field(default=512, description="longer texts are cut")
    denominator: Literal["second_views", "both_views"] = Field(
        default="second_views",
        description="B second views (release) or also the B first views (poster)",
    )
    views: Literal["dropout", "crop"] = Field(
        default="dropout",
        description="the two views of a text differ by: dropout = nothing else (SimCSE); crop = "
        "each is also a random span of its words (arXiv 2508.03453)",
    )
    crop_share: tuple[CropShare, CropShare] = Field(
        default=(0.3, 0.7),
        description="views: crop: least and greatest share of a text's words in a view",
    )

    @model_validator(mode="after")
    def _shares_in_order(self) -> UclStage:
        if self.crop_share[0] > self.crop_share[1]:
            raise ValueError(f"crop_share {list(self.crop_share)}: the least is above the greatest")
        return self


class SclStage(ContrastiveStage):
    """Stage 3, supervised contrastive learning."""

    data: tuple[PairData, ...] = Field(min_length=1)
    steps: Steps = 200
    batch_size: Annotated[int, Field(ge=2)] = 1024
    schedule: Schedule = Schedule(warmup_steps=200, total_steps=2000)
    weight_decay: Annotated[float, Field(ge=0)] = 3e-4
    query_max_tokens: Annotated[int, Field(ge=4)] = Field(
        default=512, description="longer queries are cut"
    )
    document_max_tokens: Annotated[int, Field(ge=4)] = Field(
        default=1024, description="longer documents are cut"
    )
    query_prompt: str = Field(
        default="{instruction}:",
        description="put before a query that has an instruction; stored in the model",
    )
    query_suffix: str = Field(
        default="",
        description='put after such a query ("\\n" in the release); a stored prompt cannot carry '
        "it",
    )

    teacher: TeacherSettings | None = Field(
        default=None, description="its similarities within the batch are learned, too"
    )
    guide: GuideSettings | None = Field(
        default=None, description="takes false negatives out of the batch; may be the teacher"
    )
    pretext_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="of stage 1's loss, added to each step on texts of its own"
    )
    pretext_batch_size: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="texts per step for that; null = pretext.batch_size"
    )

    @field_validator("query_prompt")
    @classmethod
    def _names_instruction(cls, value: str) -> str:
        if "{instruction}" not in value:
            raise ValueError("query_prompt must contain {instruction}")
        return value

    @property
    def judges(self) -> dict[str, JudgeSettings]:
        """Teacher and guide, those that there are, by the name of their setting."""
        both = {"scl.teacher": self.teacher, "scl.guide": self.guide}
        return {name: judge for name, judge in both.items() if judge is not None}

    def prompt_of(self, spec: PairData) -> str:
        """The prompt of a source's queries."""
        return (
            self.query_prompt.replace("{instruction}", spec.instruction) if spec.instruction else ""
        )

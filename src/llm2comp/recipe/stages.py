"""The three stages of a recipe, with the release's settings as defaults (docs/method.md lists the
deviations).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from llm2comp.recipe.objectives import OBJECTIVES, ObjectiveName, Weighting
from llm2comp.recipe.parts import (
    GuideSettings,
    JudgeSettings,
    PairData,
    Schedule,
    Section,
    Share,
    Steps,
    TeacherSettings,
    Template,
    TextData,
)


class BagPrompts(Section):
    """The two prompts of Llama2Vec (arXiv 2312.15503), without the `</s>` that it appends for
    Llama.
    """

    itself: Template = Field(
        default="{text} The original sentence:",
        description="EBAE: its last state predicts the text's tokens",
    )
    next: Template = Field(
        default="{text} The next sentence:",
        description="EBAR: its state predicts the tokens that follow",
    )


class Stage(Section):
    """What all three stages share."""

    released_rate: ClassVar[float] = 1e-4  # of the release, whose LM is 4096 wide
    steps: Steps
    batch_size: Annotated[int, Field(ge=1)] = Field(
        description="samples per optimiser step and device; stages 2 and 3: no more than the data "
        "have different ones"
    )
    schedule: Schedule
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="null = no clipping"
    )
    attention_dropout: Share = Field(default=0.0, description="in the encoder pass only")
    adapter_dropout: Share | None = Field(default=None, description="null = adapter.dropout")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="autocast of the training step"
    )
    gradient_checkpointing: bool = False
    compile: bool = Field(
        default=False, description="torch.compile of the LM's layers; the first steps are slow"
    )
    log_every_steps: Steps = 10
    save_every_steps: Steps | None = Field(
        default=None, description="checkpoint for resume; null = ten per stage"
    )
    workers: Annotated[int, Field(ge=0)] = Field(
        default=0, description="processes that prepare batches"
    )
    keep_best: str | None = Field(
        default=None,
        description="keep the step of the watch where this figure was best instead of the last: "
        "one of WATCHED, or the name "
        "of a local evaluation set of watch.tasks",
    )
    patience: Steps | None = Field(
        default=None, description="stop after so many watches without a better keep_best"
    )

    def at_width(self, width: int, full: bool = False) -> Self:
        """The stage with a numeric learning rate: `auto` scales with 1 / width, as the best rate
        for Adam does (µP).
        """
        if self.schedule.learning_rate != "auto":
            return self
        factor = 4096 / width * (0.1 if full else 1.0)
        rates = {
            "learning_rate": self.released_rate * factor,
            "floor_learning_rate": self.schedule.floor_learning_rate * factor,
        }
        return self.model_copy(update={"schedule": self.schedule.model_copy(update=rates)})

    @model_validator(mode="after")
    def _patience_for_something(self) -> Stage:
        if self.patience is not None and self.keep_best is None:
            raise ValueError(
                f"patience {self.patience} waits for nothing: set keep_best to the figure "
                "that is to improve"
            )
        return self


class PretextStage(Stage):
    """Stage 1, context compression."""

    data: tuple[TextData, ...] = Field(min_length=1)
    objective: ObjectiveName | dict[ObjectiveName, Annotated[float, Field(gt=0)]] = Field(
        default="ctkd",
        description="; ".join(f"{name}: {row.about}" for name, row in OBJECTIVES.items())
        + " Or several with their weights",
    )
    steps: Steps = 32_000
    batch_size: Annotated[int, Field(ge=1)] = 4
    gradient_accumulation_steps: Steps = 1
    max_tokens_per_batch: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="tokens computed at once, padding counted, but one text at least: the samples "
        "of an optimiser step "
        "(batch_size · gradient_accumulation_steps, as ever) are sorted by length and "
        "cut into parts; null = batch_size texts, "
        "or fewer where so many would not fit the memory",
    )
    schedule: Schedule = Schedule(warmup_steps=3200)
    weight_decay: Annotated[float, Field(ge=0)] = 1e-5
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 2.0
    min_characters: Annotated[int, Field(ge=0)] = Field(
        default=1000, description="shorter texts are left out"
    )
    max_tokens: Annotated[int, Field(ge=4)] = Field(
        default=512, description="length limit of a text"
    )
    long_texts: Literal["skip", "truncate", "chunk"] = Field(
        default="skip", description="texts over max_tokens: left out, cut, or cut into several"
    )
    group_by_length: bool = Field(
        default=True, description="texts of like length share a batch; less padding"
    )
    site_margin_tokens: Annotated[int, Field(ge=1)] = Field(
        default=10, description="split site uniform in [margin, L − margin]"
    )
    position_weighting: Weighting | None = Field(
        default=None,
        description="null = as released: "
        + ", ".join(f"{name} {row.mean}" for name, row in OBJECTIVES.items()),
    )
    train_embeddings: Literal["memory", "all"] = Field(
        default="memory",
        description="all = also the encoder's own copy of the embedding table, as the release does",
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="of both distributions in the KL"
    )
    mask_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="mntp: share of a text's tokens masked"
    )
    mask_token: str | None = Field(
        default=None,
        description="mntp: one token of the tokenizer; null = its own mask token, else `_` as in "
        "LLM2Vec",
    )
    mask_replacement: Literal["bert", "all"] = Field(
        default="bert",
        description="mntp: of the masked, 80 % become the mask token, 10 % a random one, 10 % "
        "stay; all = all the mask token",
    )
    alignment_loss: Literal["mse", "cosine"] = Field(
        default="mse", description="alignment: mean squared difference, the paper's, or 1 − cosine"
    )
    bag_prompts: BagPrompts = Field(
        default=BagPrompts(), description="ebae_ebar: what stands around the context"
    )

    @field_validator("objective")
    @classmethod
    def _one_at_least(cls, value: str | dict[str, float]) -> str | dict[str, float]:
        if not value:
            raise ValueError("objective names nothing to learn")
        return value

    @property
    def objectives(self) -> dict[str, float]:
        """Weight by objective, in a fixed order."""
        return (
            {self.objective: 1.0}
            if isinstance(self.objective, str)
            else dict(sorted(self.objective.items()))
        )

    @property
    def needs(self) -> frozenset[str]:
        """What its objectives need, all together."""
        return frozenset().union(*(OBJECTIVES[name].needs for name in self.objectives))

    def weighting_of(self, objective: str) -> Weighting:
        """The mean of one objective."""
        return self.position_weighting or OBJECTIVES[objective].mean

    @property
    def prompts(self) -> tuple[str, ...]:
        """What its objectives put around a context, beside the encoder's own prompt."""
        pair = (self.bag_prompts.itself, self.bag_prompts.next)
        return pair if "prompts" in self.needs else ()

    @property
    def needs_responses(self) -> bool:
        """Whether the texts come with responses, which are then their continuations."""
        return self.data[0].response is not None

    @model_validator(mode="after")
    def _responses_for_all(self) -> PretextStage:
        named = [spec.response is not None for spec in self.data]
        asking = [name for name in self.objectives if "responses" in OBJECTIVES[name].needs]
        if any(named) != all(named):
            raise ValueError("data with a response column and data without cannot be mixed")
        if asking and not self.needs_responses:
            raise ValueError(
                f"objective {' and '.join(asking)} needs responses: set data.0.response "
                "to their column"
            )
        if self.needs_responses and self.long_texts == "chunk":
            raise ValueError(
                "long_texts chunk: a text with a response has one piece; set skip or truncate"
            )
        return self

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
                f"no split site exists: site_margin_tokens {self.site_margin_tokens} on "
                "both sides needs texts of at least "
                f"{2 * self.site_margin_tokens} tokens, max_tokens is {self.max_tokens}"
            )
        return self


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
        "mini_batch_size only says how "
        "many rows of the table of scores are computed at once; both null = the whole "
        "batch, or what fits the memory",
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
        "each "
        "is also a random span of its words (arXiv 2508.03453)",
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

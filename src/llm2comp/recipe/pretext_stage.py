"""Stage 1 of a recipe: context compression."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from llm2comp.recipe.objectives import OBJECTIVES, ObjectiveName, Weighting
from llm2comp.recipe.parts import Schedule, Section, Steps, Template, TextData
from llm2comp.recipe.stages import Stage


class BagPrompts(Section):
    """The two prompts of Llama2Vec (arXiv 2312.15503), without Llama's `</s>` at the end."""

    itself: Template = Field(
        default="{text} The original sentence:",
        description="EBAE: its last state predicts the text's tokens",
    )
    next: Template = Field(
        default="{text} The next sentence:",
        description="EBAR: its state predicts the tokens that follow",
    )


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
        "of an optimiser step (batch_size · gradient_accumulation_steps, as ever) are sorted by "
        "length and cut into parts; null = batch_size texts, or fewer where so many would not fit "
        "the memory",
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

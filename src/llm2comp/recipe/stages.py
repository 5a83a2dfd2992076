"""What the three stages of a recipe share; defaults are the release's (docs/method.md)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llm2comp.recipe.parts import Schedule, Section, Share, Steps


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
        "one of WATCHED, or the name of a local evaluation set of watch.tasks",
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
    def _floor_below_auto(self) -> Stage:
        floor = self.schedule.floor_learning_rate
        if self.schedule.learning_rate == "auto" and floor > self.released_rate:
            raise ValueError(
                f"schedule.floor_learning_rate {floor} is above the rate of learning_rate auto, "
                f"{self.released_rate} before both are scaled to the LM's width: lower it, or "
                "give learning_rate a number"
            )
        return self

    @model_validator(mode="after")
    def _patience_for_something(self) -> Stage:
        if self.patience is not None and self.keep_best is None:
            raise ValueError(
                f"patience {self.patience} waits for nothing: set keep_best to the figure "
                "that is to improve"
            )
        return self

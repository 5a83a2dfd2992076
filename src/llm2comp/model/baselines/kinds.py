"""What a training-free encoder is, as a value: templates, span, pooling, layer. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StrictBool, StrictInt, field_validator

from llm2comp.errors import RecipeError
from llm2comp.model.baselines.prompts import ECHO, META_EOL, PROMPT_EOL, TEXT
from llm2comp.recipe import ModelSettings, Section, checked, nearest, read_yaml
from llm2comp.system.console import Dtype

BASELINE_FILE = "baseline.yaml"


class BaselineSettings(Section):
    """How a causal LM, untouched, turns a text into one vector."""

    templates: tuple[str, ...] = Field(
        default=(TEXT,),
        min_length=1,
        description="prompts that hold {text}; the embedding is the mean over all of them",
    )
    span: Literal["text", "last_copy", "last_token"] = Field(
        default="text",
        description="tokens that are pooled: of every {text}, of the last one, or the prompt's "
        "last token",
    )
    pooling: Literal["mean", "weighted_mean", "last"] = Field(
        default="mean",
        description="over the span; weighted_mean = token i of n weighs i/(1 + ... + n)",
    )
    layer: StrictInt = Field(
        default=-1,
        description="-1 = the last, after the final norm; 0 = the embeddings; negative numbers "
        "count from the end",
    )
    as_sentence: StrictBool = Field(
        default=False,
        description="as PromptEOL's code does: a final full stop (unless . ' or \" is there; ? "
        "becomes one), \" becomes '",
    )
    max_tokens: Annotated[StrictInt, Field(ge=1)] = Field(
        default=512,
        description="longest input, BOS and prompt included; of a longer one the text is cut, not "
        "the prompt",
    )

    @field_validator("templates")
    @classmethod
    def _hold_text(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value:
            if TEXT not in template:
                raise ValueError(f"a template must contain {TEXT}, found {template[:80]!r}")
        return value


NAMES = {
    "mean": BaselineSettings(),
    "input_embeddings": BaselineSettings(layer=0),  # mean of static word vectors: no layer at all
    "last_token": BaselineSettings(pooling="last"),
    "weighted_mean": BaselineSettings(pooling="weighted_mean"),  # SGPT, arXiv 2202.08904
    "echo": BaselineSettings(templates=(ECHO,), span="last_copy"),
    "prompt_eol": BaselineSettings(
        templates=(PROMPT_EOL,), span="last_token", pooling="last", as_sentence=True
    ),
    "meta_eol": BaselineSettings(
        templates=META_EOL, span="last_token", pooling="last", as_sentence=True
    ),
}


class SavedModel(Section):
    """The LM of a saved encoder; as in a recipe's `model`."""

    name: str
    revision: str | None = None
    dtype: Dtype = "auto"
    quantization: Literal["nf4", "int8"] | None = None
    bos: str = "auto"

    def settings(self, device: str = "auto") -> ModelSettings:
        """What loads it; attention is causal, so that any causal LM will do."""
        return ModelSettings(**self.model_dump(), device=device, attention="causal")


class SavedBaseline(Section):
    """Content of `baseline.yaml`: which LM, and how it encodes; nothing of the LM itself."""

    format_version: Literal[1]
    model: SavedModel
    encoder: BaselineSettings
    max_seq_length: Annotated[StrictInt, Field(ge=1)] | None = None

    def to_yaml(self) -> str:
        """Every setting written out."""
        tree = self.model_dump(mode="json")
        # An encoder's revision is of this text: what came later must not change it where unset.
        if self.max_seq_length is None:
            del tree["max_seq_length"]
        if self.model.quantization is None:
            del tree["model"]["quantization"]
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def variant(name: str, **changes: Any) -> BaselineSettings:
    """A named encoder with other settings: `variant("prompt_eol", layer=-2)`.

    Raises:
        RecipeError: no encoder of that name, an unknown setting (both name the nearest), or a value
            that does not fit.
    """
    if name not in NAMES:
        expected = f"one of {', '.join(NAMES)}"
        raise RecipeError(
            "no such training-free encoder", where=name, expected=expected, fix=nearest(name, NAMES)
        )
    return checked(BaselineSettings, NAMES[name].model_dump() | changes, name)


def read_saved(file: Path) -> SavedBaseline:
    """Content of a `baseline.yaml`.

    Raises RecipeError: no YAML, unknown keys (names the nearest), values that do not fit.
    """
    return checked(SavedBaseline, read_yaml(file, "saved encoder"), str(file))

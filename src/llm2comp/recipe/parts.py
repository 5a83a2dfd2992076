"""Sections of a recipe: model, memory, adapter, data, schedule, watch.

Each checks its own values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from llm2comp.recipe.paths import LocalName

Steps = Annotated[int, Field(ge=1)]
TEXT = "{text}"


def _holds_text(value: str) -> str:
    if value.count(TEXT) != 1:
        raise ValueError(f"prompt must contain {TEXT} once")
    return value


Template = Annotated[str, AfterValidator(_holds_text)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A section of a recipe: immutable; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSettings(Section):
    """Which causal LM, and how to run it."""

    name: LocalName = Field(
        description="Hub id, local folder, GGUF file, `builtin:smollm2` or `builtin:tiny`"
    )
    revision: str | None = Field(
        default=None,
        description="Hub branch, tag or commit; a token comes from HF_TOKEN or `hf auth login`",
    )
    dtype: Literal["auto", "fastest", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="dtype of the frozen base; auto = float32 on a CPU, bfloat16 elsewhere; "
        "fastest = bfloat16 also on a CPU that multiplies it by instructions of its own (AVX-512 "
        "BF16, AMX), where float32 is slower",
    )
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None,
        description="linear layers of the base in 4 or 8 bits (needs bitsandbytes); for adapters "
        "of kind lora",
    )
    bos: Annotated[str, Field(min_length=1)] = Field(
        default="auto",
        description="token that starts every text, for teacher and encoder alike: auto = BOS if "
        "the LM's tokenizer puts it "
        "there by itself; none; or a special token such as `<|endoftext|>`",
    )
    attention: Literal["bidirectional", "causal"] = Field(
        default="bidirectional", description="attention of the encoder pass"
    )
    attention_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None, description="null = the family's default"
    )
    device: str = Field(default="auto", description="auto = cuda, else mps, else cpu")


class MemorySettings(Section):
    """The learned memory tokens."""

    tokens: Annotated[int, Field(ge=1, le=512)] = Field(
        default=8, description="k, number of memory tokens"
    )
    nested: tuple[Steps, ...] = Field(
        default=(),
        description="every stage's loss is the mean over the last j tokens, each j of these and k",
    )
    start_as: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="words that the memory tokens begin as, the last token as the last, such as "
        "' In one word:'; null = random vectors like the LM's own (so are those before the words)",
    )

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Each j whose last j states are a representation of their own; k alone unless nested."""
        return tuple(sorted({*self.nested, self.tokens}))

    @model_validator(mode="before")
    @classmethod
    def _no_attention(cls, data: Any) -> Any:
        """Accept `attention: full` of earlier versions' runs: it was, and is, what happens."""
        if not isinstance(data, dict) or "attention" not in data:
            return data
        if data["attention"] == "separate":
            raise ValueError(
                "attention: separate is gone, as no exported folder could hold it; "
                "set model.attention: causal, under which prefixes of the memory nest by nature"
            )
        return {key: value for key, value in data.items() if (key, value) != ("attention", "full")}

    @model_validator(mode="after")
    def _fits(self) -> MemorySettings:
        if self.start_as and TEXT in self.start_as:
            raise ValueError(f"start_as holds {TEXT}: give only the words that follow the text")
        if above := [first for first in self.nested if first > self.tokens]:
            raise ValueError(
                f"nested {above} is more than the {self.tokens} memory tokens there are"
            )
        return self


class EncoderSettings(Section):
    """Which states of the encoder become the embedding."""

    pooling: Literal["memory", "mean", "last_token"] = Field(
        default="memory",
        description="memory = the states of the memory tokens; mean = those of the text's tokens "
        "(LLM2Vec), last_token = the prompt's last one (Llama2Vec): without memory tokens",
    )
    prompt: Template = Field(
        default=TEXT, description="what stands around a text when last_token is read; holds {text}"
    )
    projection: Annotated[int, Field(ge=1, strict=True)] | Literal["same"] | None = Field(
        default=None,
        description="a linear map (with bias) after the pooled state, to so many dimensions, or "
        "to the LM's width (same); it "
        "learns where the memory tokens do: in stage 1, and later under train_memory",
    )

    @model_validator(mode="after")
    def _prompt_is_read(self) -> EncoderSettings:
        if self.prompt != TEXT and self.pooling != "last_token":
            raise ValueError(f"a prompt is for pooling last_token, found {self.pooling}")
        return self


class AdapterSettings(Section):
    """What learns: LoRA, each stage adding one such adapter, or a whole copy of the LM."""

    kind: Literal["lora", "full", "none"] = Field(
        default="lora",
        description="full = all layers of a separate, trained copy of the LM encode; none = "
        "nothing of the LM learns, the memory tokens alone (the rest here is unused by both)",
    )
    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Share = 0.05
    targets: Literal["default", "all-linear"] | tuple[str, ...] = Field(
        default="default",
        description="default = the family's q, v, o, gate, up, down (not k); or module names",
    )


class TextData(Section):
    """Texts: a builtin, a file, or a Hub data set."""

    source: LocalName = Field(
        description="`builtin:python-docs`, a jsonl/csv/parquet/txt file (also .gz, .zst), a "
        "folder that `generate-responses` wrote, or a Hub data set"
    )
    column: str = Field(
        default="text",
        description="column that holds the text (ignored for .txt: a line is a text)",
    )
    response: str | None = Field(
        default=None,
        description="stage 1: column of the LM's response to the text, which is its whole "
        "continuation (docs/response.md)",
    )
    subset: str | None = Field(default=None, description="Hub data set: configuration name")
    split: str = Field(default="train", description="Hub data set: split")
    file: str | None = Field(
        default=None, description="Hub data set: one file of its repository, read as a local one is"
    )
    revision: str | None = Field(default=None, description="Hub data set: branch, tag or commit")
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="use at most so many rows"
    )


class PairData(Section):
    """Training pairs for SCL, with the instruction their queries carry."""

    source: LocalName = Field(description="as for texts")
    anchor: str = Field(default="anchor", description="column of the query")
    positive: str = Field(
        default="positive",
        description="column of the text to be found; a list gives a pair for each",
    )
    negatives: tuple[str, ...] = Field(
        default=(),
        description="columns of hard negatives; a column may hold one text or a list of texts",
    )
    instruction: str | None = Field(
        default=None, description="put before each query through scl.query_prompt"
    )
    subset: str | None = None
    split: str = "train"
    file: str | None = None
    revision: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class JudgeSettings(Section):
    """A finished sentence-transformers encoder that says which texts of a batch are alike."""

    name: LocalName = Field(
        description="Hub id, local folder (an exported encoder, too), or `package:NAME` for a "
        "model inside an installed Python package"
    )
    revision: str | None = Field(default=None, description="Hub branch, tag or commit")


class TeacherSettings(JudgeSettings):
    """An encoder whose similarities within each batch are learned."""

    weight: Annotated[float, Field(gt=0)] = Field(
        default=1.0, description="beside the loss's own 1"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        default=0.05, description="of the softmax over the teacher's similarities"
    )
    student_temperature: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="of the softmax over ours; null = the stage's temperature"
    )


class GuideSettings(JudgeSettings):
    """An encoder that takes false negatives out of each batch (GISTEmbed, arXiv 2402.16829)."""

    margin: float = Field(
        default=0.0,
        description="out goes what the guide finds nearer to the query than its positive, less "
        "this",
    )


class Schedule(Section):
    """Learning rate: warm-up from the floor, then decay to it (DeepSpeed's WarmupDecayLR)."""

    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto",
        description="auto = the release's rate for the stage (1e-4, UCL 3e-5) · 4096 / hidden "
        "width of the LM, and a tenth of that under adapter.kind full; the floor, which is meant "
        "for a width of 4096, is scaled by the same factor",
    )
    floor_learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    warmup: Literal["logarithmic", "linear"] = "logarithmic"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["linear", "constant"] = "linear"
    total_steps: Steps | None = Field(
        default=None, description="length of the schedule; null = the stage's steps"
    )

    @model_validator(mode="after")
    def _floor_below_peak(self) -> Schedule:
        if self.learning_rate != "auto" and self.floor_learning_rate > self.learning_rate:
            raise ValueError(
                f"floor_learning_rate {self.floor_learning_rate} is above learning_rate "
                f"{self.learning_rate}"
            )
        return self

    @property
    def peak(self) -> float:
        """The learning rate as a number. Raises ValueError where it is still `auto`."""
        if self.learning_rate == "auto":
            raise ValueError("learning_rate auto is a number only over a model: see Stage.at_width")
        return self.learning_rate


class WatchSettings(Section):
    """Collapse watch: measures on a fixed sample of texts during training.

    It does not influence what is learned.
    """

    every_steps: Steps | None = Field(
        default=None, description="steps from one watch to the next; null = five per stage"
    )
    texts: Annotated[int, Field(ge=8)] = Field(
        default=256, description="texts in the sample, and pairs for the alignment"
    )
    max_tokens: Annotated[int, Field(ge=16)] = Field(
        default=256, description="longer texts of the sample are cut"
    )
    data: tuple[TextData, ...] = Field(
        default=(), description="where the sample is drawn; empty = the first stage's texts"
    )
    pairs: tuple[PairData, ...] = Field(
        default=(), description="pairs for the alignment; empty = those of scl, if any"
    )
    tasks: tuple[LocalName, ...] = Field(
        default=(), description="folders of local evaluation sets, scored at every watch"
    )

"""Requests and answers: OpenAI's embeddings, and text-embeddings-inference's.

Fields that are not known are left alone, as both servers do. Answers are described here and written
by `orjson` from arrays.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Input = Annotated[
    str
    | Annotated[list[str], Field(min_length=1)]
    | Ids
    | Annotated[list[Ids], Field(min_length=1)],
    Field(
        description="A text, texts, token ids of a text, or of texts. Ids are the model's own and "
        "must be exactly those of the text that they decode to."
    ),
]
Dimensions = Annotated[
    int | None,
    Field(ge=1, description="So many of the first dimensions; null: all."),
]
NormalizeField = Annotated[bool, Field(description="Scale to length 1.")]


class Request(BaseModel):
    """What all requests share: types are not guessed (`"5"` is no number)."""

    model_config = ConfigDict(strict=True)


class EmbeddingsRequest(Request):
    """`POST /v1/embeddings`, with two fields of ours: `input_type` and `normalize`."""

    input: Input
    model: Annotated[str, Field(description="A name that /v1/models gives.")]
    encoding_format: Annotated[
        Literal["float", "base64"] | None,
        Field(description="base64: of little-endian float32."),
    ] = None
    dimensions: Dimensions = None
    input_type: Annotated[
        Literal["query", "document"] | None,
        Field(description="Put the model's prompt for it before each text."),
    ] = None
    normalize: NormalizeField = True
    user: Annotated[str | None, Field(description="Not used.")] = None


class Embedding(BaseModel):
    """One embedding; `embedding` is a string under base64."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that were read, prompts included, without BOS and memory tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Embeddings in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """One model that can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llm2comp"


class Models(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[Model]


class EmbedRequest(Request):
    """`POST /embed`."""

    inputs: Input
    normalize: NormalizeField = True
    truncate: Annotated[
        bool | None, Field(description="false: refuse texts over the model's limit.")
    ] = None
    prompt_name: Annotated[
        str | None, Field(description="A prompt of the model, such as query.")
    ] = None
    dimensions: Dimensions = None


class RerankRequest(Request):
    """`POST /rerank`."""

    query: str
    texts: Annotated[list[str], Field(min_length=1)]
    raw_scores: Annotated[
        bool, Field(description="The sum over the query's states, not their mean.")
    ] = False
    return_text: bool = False
    truncate: Annotated[bool | None, Field(description="As of /embed.")] = None


class Rank(BaseModel):
    """How well one text answers a query; `index` is its place in the request."""

    index: int
    score: float
    text: str | None = None


class SearchRequest(Request):
    """`POST /search`."""

    query: Annotated[str, Field(description="A question, or words.")]
    k: Annotated[int, Field(ge=1, le=100, description="How many passages.")] = 10
    mode: Literal["hybrid", "vectors", "keywords"] = "hybrid"
    path: Annotated[str | None, Field(description="Only files that this names: guide, `*.md`.")] = (
        None
    )


class Found(BaseModel):
    """A passage; `spans` are the places of matched words in `snippet`, in characters."""

    path: str
    first: int
    last: int
    headings: list[str]
    heading: str
    text: str
    matched: list[str]
    snippet: str
    spans: list[tuple[int, int]]
    score: float


class Hits(BaseModel):
    """Passages that answer a question, the best first."""

    hits: list[Found]


class MemoryRequest(Request):
    """`POST /memory`."""

    text: str


class MemoryMap(BaseModel):
    """The memory of a text: K × K correlations; the rest is null without the frozen LM."""

    tokens: int
    correlation: list[list[float]]
    words: list[list[str]] | None = None
    from_text: str | None = None
    from_memory: str | None = None
    from_nothing: str | None = None


class IndexInfo(BaseModel):
    """What is searched."""

    model: str
    revision: str
    files: int
    passages: int


class Info(BaseModel):
    """`GET /info`: text-embeddings-inference's fields, then ours."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: dict[str, dict[str, str]]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    auto_truncate: bool
    tokenization_workers: int
    version: str
    dimensions: int
    memory_tokens: int
    prompts: dict[str, str]
    backend: str
    index: IndexInfo | None


class Status(BaseModel):
    """How the server is."""

    status: Literal["ok", "stopping"]

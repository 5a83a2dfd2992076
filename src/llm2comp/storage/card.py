"""The README of an exported folder."""

from __future__ import annotations

from collections.abc import Mapping

from llm2comp.model.encoder import MemoryEncoder
from llm2comp.storage.clients import client_lines

USE = """from sentence_transformers import SentenceTransformer
model = SentenceTransformer("path/to/this/folder")
model.encode_query("a question"), model.encode_document("a text")"""
USE_MANY = """from sentence_transformers import MultiVectorEncoder
model = MultiVectorEncoder("path/to/this/folder")
queries, documents = model.encode_query(["a question"]), model.encode_document(["a text"])
model.similarity(queries, documents)  # MaxSim"""
WEIGHTED = (
    "The embedding is the weighted mean of the memory tokens' states (WordWeights, then "
    "mean pooling): a server that knows\n"
    "`Pooling` but not `WordWeights` would silently average all tokens. Before training the "
    "folder further, fix its weights:\n`model[{}].requires_grad_(False)`. "
)
MANY = (
    "A text is as many vectors as there are memory tokens, each of length 1, scored by "
    "MaxSim. All other tokens are on the\n"
    "skiplist of `MultiVectorMask`, for queries too: a server that skips nothing in "
    "queries would score all their tokens. "
)
LAST = "The embedding is the state of the last memory token: plain last-token pooling. "
CLIENTS = """
## Clients
`encode_query` puts the stored prompt before a query. These clients do not, unless they are told to:

"""
NESTED = "The means of its {} {} memory states are trained embeddings, too. "


def write_card(
    module: MemoryEncoder,
    prompts: Mapping[str, str | None],
    facts: dict[str, str],
    golden_file: str,
    multi_vector: bool,
) -> str:
    """Write the README: how to use the folder, and what it was made from."""
    compressor = module.compressor
    of = {
        "memory": f"memory tokens | {compressor.states}",
        "mean": "pooling | mean over the text's tokens",
    }.get(
        compressor.settings.pooling,
        f"pooling | last token of the prompt {compressor.settings.prompt!r}",
    )
    if compressor.projection is not None:
        facts = {
            "projection": f"linear, {compressor.projection.in_features} to {compressor.width} "
            "dimensions"
        } | facts
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    note = ""
    if compressor.states > 1:
        weighted = WEIGHTED.format(1 if compressor.projection is None else 2)
        note = MANY if multi_vector else LAST if compressor.last_alone else weighted
    if (smaller := compressor.prefixes[:-1]) and not compressor.last_alone:
        note += NESTED.format(compressor.order, ", ".join(map(str, smaller)))
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, llm2comp]
---
# Text encoder made by context compression (LLM2Comp)

```python
{USE_MANY if multi_vector else USE}
```

| | |
|---|---|
| base | {compressor.backbone.name} |
| {of} |
| embedding dimension | {module.get_embedding_dimension()} |
| longest text, tokens | {module.max_tokens} |
| least `max_seq_length` | {module.compressor.added + 2}; with less, nothing is cut |
| attention | {compressor.backbone.attention} |
{rows}

{note}`llm2comp verify` recomputes the vectors in `{golden_file}`.
{"" if multi_vector else _clients(prompts)}"""


def _clients(prompts: Mapping[str, str | None]) -> str:
    """Lines for clients that apply no stored prompts; nothing without prompts."""
    lines = client_lines("path/to/this/folder", prompts)
    code = "\n\n".join(f"# {name}\n{code}" for name, code in lines.items())
    return f"{CLIENTS}```python\n{code}\n```\n" if lines else ""

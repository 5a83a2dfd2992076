"""The folder for llama.cpp: the file, golden vectors for a running server, and a card."""

from __future__ import annotations

import unicodedata
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from tokenizers.normalizers import NFC

from llm2comp.storage.gguf_file import GGUF_FILE, write_gguf
from llm2comp.storage.golden import FORMAT_VERSION, GOLDEN_FILE, golden_vectors, load_as, rounded
from llm2comp.storage.probes import probes
from llm2comp.storage.weights import memory_ids
from llm2comp.system.console import say
from llm2comp.system.files import to_json, write_text

# Lowest cosine of what llama.cpp computes with matrices in half precision.
MIN_COSINE = 0.999
_CARD = """---
library_name: llama.cpp
pipeline_tag: sentence-similarity
tags: [gguf, feature-extraction, llm2comp]
---
# Text encoder made by context compression (LLM2Comp), for llama.cpp

```bash
llama-server -m {file} --embeddings --pooling last -c {length} -b {length} -ub {length}
curl http://127.0.0.1:8080/v1/embeddings -d '{{"input": "a text{suffix}"}}'
llm2comp verify THIS_FOLDER --url http://127.0.0.1:8080
```
{note}
| | |
|---|---|
{rows}

llama.cpp cuts no text: longer ones than {length} tokens are refused by the server.
`llm2comp verify --url` holds a running server against the vectors in `{golden}`.
"""
_SUFFIX = """
The text ends with `{suffix}`, the memory tokens before the last, which llama.cpp adds by itself.
Without them the embedding is another one.
"""
_PROMPT = """
llama.cpp knows no prompts: put the {role}'s in front of it, `{prompt}`
"""
_NFC = """
Send texts in NFC (in Python `unicodedata.normalize("NFC", text)`): the LM's own tokenizer composes
letters with their accents first, llama.cpp does not. Of decomposed texts it makes other embeddings.
"""


def write_gguf_folder(stock: Path, target: Path, facts: dict[str, str], dtype: str) -> None:
    """Fill a folder for llama.cpp from one that `export` wrote.

    Raises:
        ModelFolderError: llama.cpp does not compute such a model, or parts texts otherwise.
    """
    model: Any = load_as(stock, "cpu", SentenceTransformer, "float32")
    suffix = write_gguf(stock, target / GGUF_FILE, list(memory_ids(model).values()), dtype)
    length = int(model.max_seq_length)
    texts = [(model.prompts.get(p.role or "") or "") + p.text for p in probes(model.prompts)]
    # llama.cpp has no normaliser: the client composes, and so do we
    if composes := isinstance(model.tokenizer.backend_tokenizer.normalizer, NFC):
        texts = list(dict.fromkeys(unicodedata.normalize("NFC", text) for text in texts))
    whole = [t for t in texts if len(model.tokenizer(t, truncation=False).input_ids) <= length]
    golden = {
        "format_version": FORMAT_VERSION,
        "llm2comp": version("llm2comp"),
        "engine": "llama.cpp",
        "licence": facts.get("licence", "unknown"),
        "minimum_cosine": MIN_COSINE,
        "suffix": suffix,
        "texts": whole,
        "embeddings": rounded(golden_vectors(model, whole)),
    }
    write_text(target / GOLDEN_FILE, to_json(golden))
    note = _SUFFIX.format(suffix=suffix) if suffix else ""
    note += "".join(
        _PROMPT.format(role=role, prompt=prompt) for role, prompt in model.prompts.items() if prompt
    )
    if composes:
        note += _NFC
        say(f"{GGUF_FILE}: send texts in NFC, as llama.cpp does not compose decomposed letters")
    rows = {"embedding dimension": model.get_embedding_dimension(), "matrices": dtype} | facts
    card = _CARD.format(
        file=GGUF_FILE,
        length=length,
        suffix=suffix,
        note=note,
        golden=GOLDEN_FILE,
        rows="\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in rows.items()),
    )
    write_text(target / "README.md", card)

"""A trained encoder as a plain sentence-transformers folder, and the check that a folder still gives what it gave.

`export` (DESIGN 1.7), so that `SentenceTransformer(folder)` needs no flag, no code and not this package:
1. merge the adapters into a copy of the LM (float32, then the base's dtype); keep the model without its LM head
2. append the memory vectors to the vocabulary as special tokens `<mem_0>`.. (row ÷ the family's embedding scale)
3. let the tokenizer's one template put BOS before and the memory tokens behind every text; truncation keeps both
4. write `is_causal: false` (bidirectional encoders) into the config, and the modules
   Transformer → WordWeights (memory tokens by their weight, all else 0) → Pooling (mean)
5. load the folder as any user would, hold its embeddings against the native ones, store them as golden.json
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer, WordWeights
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llm2comp.backbone import Backbone
from llm2comp.encoder import MemoryEncoder, embed_texts
from llm2comp.errors import BackboneError, ModelFolderError
from llm2comp.files import new_folder, write_text

FORMAT_VERSION = 1
GOLDEN_FILE = "golden.json"
GOLDEN_TEXTS = (
    "Compression keeps what matters.",
    "Mémoire 記憶 ذاكرة 🧠 — a line of many scripts, 12,345.678 numbers\nand a second line.",
    "A long text that is cut at the model's limit. " * 200,
)
MIN_COSINE = {"float32": 0.99999, "bfloat16": 0.999, "float16": 0.9999}
TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# Gemma 3 halves its sliding window when it reads this key; `is_causal` alone suffices there.
NO_BIDIRECTIONAL_KEY = {"gemma3_text", "gemma3"}


def export(model: SentenceTransformer, folder: Path, card: dict[str, str] | None = None) -> None:
    """Write a live memory encoder as a stock sentence-transformers folder; replaces the folder as a whole.

    Args:
        model: as `as_sentence_transformer` or `llm2comp.load` on a stage folder give it.
        folder: where to.
        card: facts for the folder's README: `base`, `licence`, `trained_on`, `command`, `note`.

    Raises:
        ModelFolderError: the exported folder embeds otherwise than the native encoder.
        BackboneError: the tokenizer cannot carry a template.
        RunError: the folder cannot be written.
    """
    module = model[0]
    if not isinstance(module, MemoryEncoder):
        raise ModelFolderError("is exported already", expected="a live memory encoder", found=type(module).__name__)
    native = embed_texts(model, GOLDEN_TEXTS)
    dtype = str(module.compressor.backbone.embedding_table.dtype).removeprefix("torch.")
    with new_folder(folder) as target:
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            tokens = _write_transformer(module, Path(scratch))
            stock = _modules(module, Path(scratch), tokens)
            stock.prompts = dict(model.prompts)
            stock.save(str(target), create_model_card=False)
        exported = embed_texts(SentenceTransformer(str(target), device="cpu", model_kwargs={"dtype": "float32"}), GOLDEN_TEXTS)
        lowest = torch.cosine_similarity(native, exported).min().item()
        if not lowest >= MIN_COSINE[dtype]:
            raise ModelFolderError(
                "the exported folder does not embed as the native encoder",
                where=str(folder),
                expected=f"cosine ≥ {MIN_COSINE[dtype]}",
                found=f"{lowest:.6f}",
            )
        golden = {
            "format_version": FORMAT_VERSION,
            "llm2comp": version("llm2comp"),
            "base": module.compressor.backbone.name,
            "licence": (card or {}).get("licence", "unknown"),
            "minimum_cosine": MIN_COSINE[dtype],
            "texts": list(GOLDEN_TEXTS),
            "embeddings": [[round(value, 7) for value in row] for row in exported.tolist()],
        }
        write_text(target / GOLDEN_FILE, json.dumps(golden))
        write_text(target / "README.md", _card(module, card or {}))


def verify(folder: Path) -> float:
    """Recompute the golden embeddings of an exported folder. Returns the lowest cosine to the stored ones.

    Raises:
        ModelFolderError: no such folder, no golden.json, a file missing or truncated, or embeddings that differ.
    """
    golden_file = folder / GOLDEN_FILE
    try:
        golden: dict[str, Any] = json.loads(golden_file.read_text(encoding="utf-8"))
        expected = torch.tensor(golden["embeddings"])
        minimum = float(golden["minimum_cosine"])
        texts = [str(text) for text in golden["texts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelFolderError(
            f"cannot be checked: {error}", where=str(golden_file), expected="a model/ folder written by llm2comp"
        ) from error
    if golden.get("format_version") != FORMAT_VERSION:
        raise ModelFolderError(
            "unknown format", where=str(golden_file), expected=FORMAT_VERSION, found=golden.get("format_version")
        )
    found = embed_texts(load_folder(folder, device="cpu"), texts)
    if found.shape != expected.shape:
        raise ModelFolderError("embeddings of another shape", where=str(folder), expected=expected.shape, found=found.shape)
    lowest = torch.cosine_similarity(expected, found).min().item()
    if not lowest >= minimum:
        raise ModelFolderError(
            "gives other embeddings than when it was saved",
            where=str(folder),
            expected=f"cosine ≥ {minimum}",
            found=f"{lowest:.6f}",
            fix="a file was changed or damaged: copy the folder again",
        )
    return lowest


def memory_names(model: SentenceTransformer) -> list[str] | None:
    """The memory tokens of a loaded folder that `export` wrote, in order; None for any other model."""
    words = [module for module in model if isinstance(module, WordWeights)]
    return list(words[0].word_weights) if len(model) == 3 and words and model[1] is words[0] else None


def reweight(folder: Path, weights_K: Sequence[float]) -> None:
    """Give the memory tokens of an exported folder other weights in the mean, and renew its golden vectors.

    Raises:
        ModelFolderError: not a folder that `export` wrote, or another number of memory tokens. RunError: cannot be written.
    """
    model = load_folder(folder, device="cpu")
    names = memory_names(model)
    if names is None or len(names) != len(weights_K):
        found = "another kind of model" if names is None else f"{len(names)} memory tokens"
        raise ModelFolderError(
            "cannot be given weights", where=str(folder), expected=f"a folder with {len(weights_K)} memory tokens", found=found
        )
    verify(folder)
    old: Any = model[1]
    words = WordWeights(old.vocab, dict(zip(names, map(float, weights_K), strict=True)), unknown_word_weight=0.0)
    with new_folder(folder) as target:
        shutil.copytree(folder, target, dirs_exist_ok=True)
        words.save(str(target / json.loads((folder / "modules.json").read_text())[1]["path"]))
        golden = json.loads((folder / GOLDEN_FILE).read_text(encoding="utf-8"))
        embeddings = embed_texts(load_folder(target, device="cpu"), golden["texts"])
        golden["embeddings"] = [[round(value, 7) for value in row] for row in embeddings.tolist()]
        write_text(target / GOLDEN_FILE, json.dumps(golden))


def load_folder(folder: Path, device: str | None = None) -> SentenceTransformer:
    """`SentenceTransformer(folder)` with one clear error for whatever is wrong with the folder.

    Raises:
        ModelFolderError: missing, incomplete, truncated, or in need of code that is not installed.
    """
    if not (folder / "modules.json").is_file():
        raise ModelFolderError("not a sentence-transformers folder", where=str(folder), expected="modules.json in it")
    try:
        safe = {"use_safetensors": True}
        model = SentenceTransformer(str(folder), device=device, local_files_only=True, model_kwargs=safe)
        embed_texts(model, ["a trial: some damage shows only here"])
        return model
    except Exception as error:  # what libraries raise on a broken file has no common base
        raise ModelFolderError(
            f"cannot be loaded: {(str(error).strip() or type(error).__name__).splitlines()[0]}",
            where=str(folder),
            fix="a file is missing or damaged: copy the folder again or export anew",
        ) from error


def _write_transformer(module: MemoryEncoder, folder: Path) -> list[str]:
    """Steps 1 to 4 of the module docstring up to the config. Returns the memory tokens' names."""
    compressor = module.compressor
    backbone = compressor.backbone
    tokenizer, names = _tokenizer_with_memory(backbone, compressor.memory.count)
    lm = backbone.adapters.merged().cpu()
    body = lm.base_model
    ids = tokenizer.convert_tokens_to_ids(names)
    with torch.no_grad():
        if compressor.embedding is not None:
            own = next(compressor.embedding.parameters())
            body.get_input_embeddings().weight.copy_(own)
        if max(ids) >= len(body.get_input_embeddings().weight):
            body.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        table = body.get_input_embeddings().weight
        table[ids] = (compressor.memory.vectors_KD / backbone.embedding_scale).to(table)
    if backbone.attention == "bidirectional":
        body.config.is_causal = False
        if body.config.model_type not in NO_BIDIRECTIONAL_KEY:
            body.config.use_bidirectional_attention = True
    body.save_pretrained(folder)
    tokenizer.model_max_length = module.max_seq_length
    tokenizer.save_pretrained(folder)
    return names


def _tokenizer_with_memory(backbone: Backbone, count: int) -> tuple[Any, list[str]]:
    """The backbone's tokenizer with the template BOS, text, memory, padded on the right.

    It is rebuilt as the generic class: a family's own class may set up its template anew when it is loaded. No chat template.
    """
    backend = getattr(backbone.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise BackboneError("has no fast tokenizer, which the exported folder needs", where=backbone.name)
    backend = Tokenizer.from_str(backend.to_str())
    prefix = "<mem_" if backend.token_to_id("<mem_0>") is None else "<llm2comp_mem_"
    names = [f"{prefix}{i}>" for i in range(count)]
    backend.add_special_tokens(names)
    own = dict(backbone.tokenizer.special_tokens_map)
    start = [] if backbone.bos_id is None else [backbone.tokenizer.bos_token]
    ids = [(name, backend.token_to_id(name)) for name in [*start, *names]]
    backend.post_processor = TemplateProcessing(single=[*start, "$A", *names], special_tokens=ids)
    special = {key: own[key] for key in ("bos_token", "eos_token", "unk_token") if key in own}
    # Padding is masked, so any token will do where the family has none; a memory token is surely there.
    special["pad_token"] = own.get("pad_token", names[-1])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="right", truncation_side="right", additional_special_tokens=names, **special
    ), names


def _modules(module: MemoryEncoder, folder: Path, names: list[str]) -> SentenceTransformer:
    transformer = Transformer(
        str(folder),
        modality_config=TEXT_ONLY,
        module_output_name="token_embeddings",
        unpad_inputs=False,  # WordWeights needs the padded mask
        max_seq_length=module.max_seq_length,
    )
    size = transformer.auto_model.get_input_embeddings().weight.shape[0]
    by_id = {index: token for token, index in transformer.tokenizer.get_vocab().items()}
    weights = module.compressor.get_buffer("weights_K").tolist()
    vocabulary = [by_id.get(index, f"<unused_{index}>") for index in range(size)]
    words = WordWeights(vocabulary, dict(zip(names, weights, strict=True)), unknown_word_weight=0.0)
    words.requires_grad_(False)
    pooling = Pooling(module.get_embedding_dimension(), "mean")
    return SentenceTransformer(modules=[transformer, words, pooling], device="cpu")


def _card(module: MemoryEncoder, card: dict[str, str]) -> str:
    compressor = module.compressor
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in card.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, llm2comp]
---
# Text encoder made by context compression (LLM2Comp)

```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("path/to/this/folder")
model.encode_query("a question"), model.encode_document("a text")
```

| | |
|---|---|
| base | {compressor.backbone.name} |
| memory tokens | {compressor.memory.count} |
| embedding dimension | {module.get_embedding_dimension()} |
| longest text, tokens | {module.max_tokens} |
| attention | {compressor.backbone.attention} |
{rows}

The embedding is the weighted mean of the memory tokens' states (WordWeights, then mean pooling): a server that knows
`Pooling` but not `WordWeights` would silently average all tokens. `llm2comp verify` recomputes the vectors in `{GOLDEN_FILE}`.
"""

"""The weights of the memory tokens in the mean, of a live encoder or an exported folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer, WordWeights
from tokenizers.processors import TemplateProcessing

from llm2comp.model.compressor import too_few_memory_tokens
from llm2comp.model.encoder import MemoryEncoder
from llm2comp.model.memory import Order, prefix_weights
from llm2comp.storage.stock import MEMORY_NAME, ORDER_KEY


def memory_ids(model: SentenceTransformer) -> dict[str, int]:
    """Name → id of an exported folder's memory tokens, in order; none for any other model.

    They stand in the tokenizer's template alone; in folders of earlier versions, which hold them as
    added tokens, there too.
    """
    tokenizer: Any = model[0].tokenizer if isinstance(model[0], Transformer) else None
    template = getattr(getattr(tokenizer, "backend_tokenizer", None), "post_processor", None)
    if not isinstance(template, TemplateProcessing):
        return {}
    tokens = json.loads(template.__getstate__())["special_tokens"]
    return {
        name: piece["ids"][0]
        for name, piece in sorted(tokens.items(), key=_first_id)
        if MEMORY_NAME.fullmatch(name)
    }


def _first_id(item: tuple[str, Any]) -> int:
    found: int = item[1]["ids"][0]
    return found


def memory_names(model: SentenceTransformer) -> list[str] | None:
    """The memory tokens of an exported folder, in order; None for any other model."""
    return list(memory_ids(model)) or None


def word_weights(model: SentenceTransformer) -> Any:
    """The module that weighs the tokens of a loaded folder; None where there is none."""
    return next((module for module in model if isinstance(module, WordWeights)), None)


def memory_weights(model: SentenceTransformer) -> list[float] | None:
    """Weights of the memory tokens of any model that `load` gave; None for one without."""
    if isinstance(model[0], MemoryEncoder):
        compressor = model[0].compressor
        return compressor.get_buffer("weights_K").tolist() if compressor.memory.count else None
    if not (ids := memory_ids(model)):
        return None
    if (words := word_weights(model)) is None:
        size = len(ids) if _last_token(model) else 1
        return prefix_weights(size, 1, "last").tolist()
    found: list[float] = words.emb_layer.weight[list(ids.values()), 0].tolist()
    return found


def set_weights(model: SentenceTransformer, weights_K: Sequence[float]) -> None:
    """Give the memory tokens of a loaded folder, two or more of them, other weights."""
    ids, words = memory_ids(model), word_weights(model)
    assert words is not None
    assert len(ids) == len(weights_K)
    words.word_weights = dict(zip(ids, map(float, weights_K), strict=True))
    with torch.no_grad():
        rows: Any = words.emb_layer.weight
        rows[list(ids.values()), 0] = torch.tensor(weights_K, dtype=rows.dtype, device=rows.device)


def use_prefix(model: SentenceTransformer, size: int) -> None:
    """Let a model's embedding be the mean of so many memory states, in the order of its own.

    Raises:
        ModelFolderError: the model has not so many memory tokens to give, or none.
    """
    if isinstance(model[0], MemoryEncoder):
        model[0].compressor.use_prefix(size)
        return
    count, weighed = len(memory_ids(model)), word_weights(model) is not None
    given = count if weighed else min(count, int(_last_token(model)))
    if not 1 <= size <= given:
        raise too_few_memory_tokens(given, size)
    if weighed:
        set_weights(model, prefix_weights(count, size, memory_order(model)).tolist())


def memory_order(model: SentenceTransformer) -> Order:
    """From which end the prefixes of a loaded folder that `export` wrote begin."""
    module: Any = model[0]
    return "last" if getattr(module.auto_model.config, ORDER_KEY, "first") == "last" else "first"


def _last_token(model: SentenceTransformer) -> bool:
    """Whether a loaded folder pools by last token."""
    return any(isinstance(part, Pooling) and part.pooling_mode == "lasttoken" for part in model)

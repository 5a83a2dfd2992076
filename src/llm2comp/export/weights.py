"""The weights of the memory tokens in the mean: of a live encoder, and of a loaded folder that `export` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer, WordWeights

from llm2comp.compressor import too_few_memory_tokens
from llm2comp.encoder import MemoryEncoder
from llm2comp.export.stock import MEMORY_NAME
from llm2comp.memory import prefix_weights


def memory_names(model: SentenceTransformer) -> list[str] | None:
    """The memory tokens of a loaded folder that `export` wrote, in order; None for any other model."""
    tokenizer: Any = model[0].tokenizer if isinstance(model[0], Transformer) else None
    if not hasattr(tokenizer, "get_added_vocab"):
        return None
    added: dict[str, int] = tokenizer.get_added_vocab()
    return sorted(filter(MEMORY_NAME.fullmatch, added), key=added.__getitem__) or None


def word_weights(model: SentenceTransformer) -> Any:
    """The module that weighs the tokens of a loaded folder; None where there is none."""
    return next((module for module in model if isinstance(module, WordWeights)), None)


def memory_weights(model: SentenceTransformer) -> list[float] | None:
    """Weights of the memory tokens of any model that `load` gave; None for one without."""
    if isinstance(model[0], MemoryEncoder):
        compressor = model[0].compressor
        return compressor.get_buffer("weights_K").tolist() if compressor.memory.count else None
    if (names := memory_names(model)) is None:
        return None
    if (words := word_weights(model)) is None:
        return [1.0]  # one memory token is pooled as the last one
    found: list[float] = words.emb_layer.weight[model.tokenizer.convert_tokens_to_ids(names), 0].tolist()
    return found


def set_weights(model: SentenceTransformer, weights_K: Sequence[float]) -> None:
    """Give the memory tokens of a loaded folder, two or more of them, other weights."""
    names, words = memory_names(model) or [], word_weights(model)
    assert words is not None
    assert len(names) == len(weights_K)
    words.word_weights = dict(zip(names, map(float, weights_K), strict=True))
    with torch.no_grad():
        rows: Any = words.emb_layer.weight
        rows[model.tokenizer.convert_tokens_to_ids(names), 0] = torch.tensor(weights_K, dtype=rows.dtype, device=rows.device)


def use_first(model: SentenceTransformer, first: int) -> None:
    """Let a model's embedding be the mean of its first memory states.

    Raises:
        ModelFolderError: the model has not so many memory tokens, or none.
    """
    if isinstance(model[0], MemoryEncoder):
        model[0].compressor.use_first(first)
        return
    count = len(memory_names(model) or ())
    if not 1 <= first <= count:
        raise too_few_memory_tokens(count, first)
    if count > 1:
        set_weights(model, prefix_weights(count, first).tolist())

"""Texts → vectors, the one way: batches of like length within a budget of tokens.

embed_texts      texts through any sentence-transformers model → embeddings
memory_states    rows of token ids through a compressor → its states
memory_vectors   texts → memory states of length 1, for late interaction

All of them, bulk embedding, the measures and mteb's encoder go through `in_batches`. It alone says
what happens when memory runs out: the budget is halved for good, and the work goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llm2comp.errors import ModelFolderError
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import MemoryEncoder
from llm2comp.model.inputs import Inputs
from llm2comp.model.tokens import Tokens
from llm2comp.system.console import Bar, say

# Measured on a CPU, where larger batches outgrow its caches; a guess for devices with many cores.
AT_ONCE_ON_CPU, AT_ONCE_ELSEWHERE = 1024, 16_384
# Numbers that wait on the device until they are fetched together: each fetch waits for the device.
FETCH_AT = 2**24


@dataclass
class Budget:
    """Tokens that are computed at once, padding included; halved whenever memory runs out."""

    tokens: int

    @classmethod
    def of(cls, device: torch.device, tokens: int | None = None) -> Budget:
        """So many tokens; None: what suits the device."""
        return cls(tokens or (AT_ONCE_ON_CPU if device.type == "cpu" else AT_ONCE_ELSEWHERE))


def unit_length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors (..., D) scaled to length 1; one of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)
    return scaled


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device's memory, or the CPU's, was too small."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


@torch.no_grad()
def in_batches(
    lengths: Sequence[int],
    compute: Callable[[list[int]], Tensor],
    budget: Budget,
    bar: Bar | None = None,
) -> Tensor:
    """Vectors of N texts in their order: (N, ...), float32, on the CPU; (0,) without texts.

    The longest texts go first, so what does not fit shows at once. A batch holds as many texts as
    keep it within the budget when all are padded to its longest; one text at least.

    Args:
        lengths: tokens of each text, with all that the model adds to it.
        compute: places of some texts → their vectors, in that order, on any device.
        budget: tokens at once. Lowered here when memory runs out, so that its owner keeps it low.
        bar: is told how many texts are done.

    Raises:
        RuntimeError: there is no memory for a single text; as `compute`.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    out: Tensor | None = None
    waiting: list[tuple[list[int], Tensor]] = []
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        places = order[start : start + max(1, budget.tokens // longest)]
        found: Tensor | None = None
        try:
            found = compute(places).float()
        except RuntimeError as error:
            if len(places) == 1 or not is_out_of_memory(error):
                raise
        if found is None:  # outside of `except`, whose error would keep the failed batch alive
            budget.tokens = longest * len(places) // 2
            clear_device_cache(garbage_collection=True)
            say(f"out of memory: going on with {budget.tokens:,} tokens at once")
            continue
        waiting.append((places, found))
        start += len(places)
        if start == len(order) or sum(vectors.numel() for _, vectors in waiting) >= FETCH_AT:
            fetched = torch.cat([vectors for _, vectors in waiting]).cpu()
            out = fetched.new_empty(len(order), *fetched.shape[1:]) if out is None else out
            out[[i for group, _ in waiting for i in group]] = fetched
            waiting.clear()
        if bar is not None:
            bar.advance(len(places))
    return torch.empty(0) if out is None else out


def embeddings_of(inputs: Inputs, budget: Budget, bar: Bar | None = None) -> Tensor:
    """Embeddings of texts in order, (N, D), as `in_batches`."""
    model = inputs.model.eval()

    def compute(places: list[int]) -> Tensor:
        with torch.inference_mode():
            found_BD = model(inputs.features(places), **inputs.task)["sentence_embedding"]
            embeddings_BD: Tensor = found_BD[:, : model.truncate_dim]
            return embeddings_BD

    if not inputs.texts:
        return torch.empty(0, model.get_embedding_dimension() or 0)
    return in_batches(inputs.lengths, compute, budget, bar)


def embed_texts(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    role: str | None = None,
    max_tokens_per_batch: int | None = None,
    bar: Bar | None = None,
) -> Tensor:
    """Embeddings in order, (N, D), float32, on the CPU; not normalised, too long texts are cut.

    Args:
        model: any sentence-transformers model.
        texts: the texts.
        role: `query` or `document`: with the model's prompt and limit for it.
        max_tokens_per_batch: tokens at once, padding included; None: what suits the device.
        bar: is told how many texts are done.
    """
    budget = Budget.of(model.device, max_tokens_per_batch)
    return embeddings_of(Inputs.of(model, texts, role=role), budget, bar)


def memory_states(
    compressor: Compressor, rows: Sequence[Sequence[int]], max_tokens_per_batch: int | None = None
) -> Tensor:
    """Memory states of token rows (BOS included) in order: memory_NKD, float32, on the CPU."""
    table, pad_id = compressor.backbone.input_table, compressor.backbone.pad_id

    def compute(places: list[int]) -> Tensor:
        tokens = Tokens.pad([rows[i] for i in places], "left", pad_id)
        return compressor.memory_states(tokens.to(table.device))

    lengths = [len(row) + compressor.added for row in rows]
    found = in_batches(lengths, compute, Budget.of(table.device, max_tokens_per_batch))
    return found.view(len(rows), compressor.states, table.shape[1])


def memory_vectors(
    model: SentenceTransformer,
    texts: Sequence[str],
    role: str | None = None,
    max_tokens_per_batch: int | None = None,
) -> Tensor:
    """Memory states of texts, each of length 1, for late interaction: memory_NKD.

    Args:
        model: a live memory encoder.
        texts: the texts.
        role: `query` or `document`: with the model's prompt and limit for it.
        max_tokens_per_batch: tokens at once, padding included; None: what suits the device.

    Raises:
        ModelFolderError: another kind of model, or one that projects its embeddings.
    """
    module = model[0]
    if not isinstance(module, MemoryEncoder) or not module.compressor.memory.count:
        expected = "a live encoder with memory tokens"
        raise ModelFolderError("has no memory states to give", expected=expected)
    if module.compressor.projection is not None:
        raise ModelFolderError(
            "cannot be many vectors: the projection stands behind the mean of the memory states",
            where="encoder.projection",
            fix="use it as one vector per text, or train with encoder.projection: null",
        )
    rows = module.rows(texts, model.prompts.get(role) if role else None, role) if texts else []
    states_NKD = memory_states(module.compressor, rows, max_tokens_per_batch)
    return torch.nn.functional.normalize(states_NKD, dim=-1)

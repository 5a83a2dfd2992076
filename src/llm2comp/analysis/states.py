"""Memory states of many texts, as the measures need them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm2comp.compressor import Compressor
from llm2comp.tokens import Tokens, longest_first

TOKENS_AT_ONCE = 8192


@torch.no_grad()
def memory_states(compressor: Compressor, rows: Sequence[Sequence[int]], tokens_at_once: int = TOKENS_AT_ONCE) -> Tensor:
    """Memory states of token rows (BOS included) in order: memory_NKD, float32, on the CPU.

    Texts of like length are read together, as many as fit into `tokens_at_once` with their padding.
    """
    device, count = compressor.backbone.embedding_table.device, compressor.states
    out = torch.empty(len(rows), count, compressor.backbone.embedding_table.shape[1])
    for places in longest_first([len(row) for row in rows], lambda longest: tokens_at_once // (longest + compressor.added)):
        tokens = Tokens.pad([rows[i] for i in places], "left", compressor.backbone.pad_id).to(device)
        out[places] = compressor.encode(tokens).float().cpu()
    return out

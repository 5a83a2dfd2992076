"""Masked next-token prediction, LLM2Vec (arXiv 2404.05961): the text's own states, no memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm2comp.errors import BackboneError
from llm2comp.model.tokens import NOT_MASKED, SplitTexts, Tokens
from llm2comp.objectives.kl import chunked_cross_entropy
from llm2comp.objectives.loss import Mean, Passes

MASK_TOKEN = "_"  # what LLM2Vec's `mask_token_type: blank`, in all of its settings, stands for


def loss(passes: Passes, mean: Mean) -> Tensor:
    """−log g_φ(n_j given the state at j − 1 of the text with its masks), j masked."""
    replaced_BT, text = _masks(passes.batch), passes.batch.text
    masked_BT = replaced_BT != NOT_MASKED
    before_BT = masked_BT.roll(-1, 1)  # the first token is never masked
    read = Tokens(torch.where(masked_BT, replaced_BT, text.ids_BT), text.mask_BT)
    states_ND = passes.text_states(read, before_BT)[before_BT]
    weights_N = mean.position_weights(masked_BT.sum(1))
    targets_N = text.ids_BT[masked_BT]
    return chunked_cross_entropy(states_ND, targets_N, passes.backbone.project, weights_N)


def positions(batch: SplitTexts, bos: bool) -> int:
    """The masked tokens."""
    return int((_masks(batch) != NOT_MASKED).sum())


def _masks(batch: SplitTexts) -> Tensor:
    if batch.replaced_BT is None:
        raise ValueError("expected a batch with masks (replaced_BT), got none")
    return batch.replaced_BT


def mask_token_id(tokenizer: Any, asked: str | None, where: str) -> int:
    """Id of the token that stands in for a masked one.

    Args:
        tokenizer: of the LM.
        asked: the token, as an entry of the vocabulary or as text; None = the tokenizer's own mask
            token, else `_`.
        where: the LM's name, for the error.

    Raises:
        BackboneError: it is not one token.
    """
    if asked is None and tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    token = MASK_TOKEN if asked is None else asked
    if (entry := tokenizer.get_vocab().get(token)) is not None:
        return int(entry)
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise BackboneError(
            f"the mask token {token!r} is not one token",
            where=where,
            expected="one token of its tokenizer",
            found=len(ids),
            fix="set pretext.mask_token to a token of its vocabulary",
        )
    return int(ids[0])

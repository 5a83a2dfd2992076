"""Objectives on the text's own states in the encoder pass, adapters on; the head that predicts the tokens is frozen.

MNTP (LLM2Vec, arXiv 2404.05961) and EBAE with EBAR (Llama2Vec, arXiv 2312.15503). Neither reads memory tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm2comp.backbone import Backbone
from llm2comp.compressor import Compressor
from llm2comp.errors import BackboneError
from llm2comp.pretext.kl import chunked_bag_entropy, chunked_cross_entropy
from llm2comp.pretext.weighting import Weighting, position_weights, text_weights
from llm2comp.recipe.stages import BagPrompts
from llm2comp.tokens import NOT_MASKED, SplitTexts, Tokens, wrap

MASK_TOKEN = "_"  # what LLM2Vec's `mask_token_type: blank`, in all of its settings, stands for


def mntp_from_text(
    compressor: Compressor, batch: SplitTexts, weighting: Weighting, items: float, prompts: BagPrompts
) -> Tensor:
    """Masked next-token prediction: −log g_φ(n_j given the state at j − 1 of the text with its masks), j masked."""
    replaced_BT = batch.replaced_BT
    if replaced_BT is None:
        raise ValueError("expected a batch with masks (replaced_BT), got none")
    ids_BT, masked_BT = batch.text.ids_BT, replaced_BT != NOT_MASKED
    before_BT = masked_BT.roll(-1, 1)  # the first token is never masked
    states_BTD = _read(compressor, Tokens(torch.where(masked_BT, replaced_BT, ids_BT), batch.text.mask_BT), before_BT)
    states_ND, targets_N = states_BTD[before_BT], ids_BT[masked_BT]
    weights_N = position_weights(masked_BT.sum(1), weighting, items)
    return chunked_cross_entropy(states_ND, targets_N, compressor.backbone.project, weights_N)


def ebae_ebar_from_text(
    compressor: Compressor, batch: SplitTexts, weighting: Weighting, items: float, prompts: BagPrompts
) -> Tensor:
    """Half EBAE, half EBAR: −log g_φ(t given the state of a prompt's last token), t each distinct token of a target.

    The prompt `itself` around the context must predict the context's tokens (without BOS), `next` the continuation's.
    Under `sample_mean` each bag has its mean and the two weigh 1/2 each, as released; under `token_mean` all tokens alike.
    """
    backbone = compressor.backbone
    bos = backbone.bos_id is not None
    terms = []
    for prompt, bags_BT in zip((prompts.itself, prompts.next), both_bags(batch, bos), strict=True):
        tokens = wrap(batch.context, *backbone.around(prompt), bos)
        last_BT = torch.zeros_like(tokens.mask_BT, dtype=torch.bool)
        last_BT[:, -1] = True
        states_BD = _read(compressor, tokens, last_BT)[:, -1]
        share = 2.0 if weighting == "sample_mean" else 1.0
        weights_B = text_weights((bags_BT >= 0).sum(1), weighting, share * items)
        terms.append(chunked_bag_entropy(states_BD, bags_BT, backbone.project, weights_B))
    return torch.stack(terms).sum()


def _read(compressor: Compressor, tokens: Tokens, needed_BT: Tensor) -> Tensor:
    """The needed states of the encoder pass over texts alone, in the frozen head's dtype: states_BTD."""
    states_BTD = compressor.backbone.read(compressor.embed(tokens.ids_BT), tokens.mask_BT, needed_BT)
    return states_BTD.to(compressor.backbone.embedding_table.dtype)


def both_bags(batch: SplitTexts, bos: bool) -> tuple[Tensor, Tensor]:
    """What EBAE and EBAR must predict: bags of the contexts (without their BOS, if any) and of the continuations."""
    return bag_ids(batch.context, int(bos)), bag_ids(batch.continuation, 0)


def bag_ids(tokens: Tokens, start: int) -> Tensor:
    """Each text's distinct token ids behind its first `start` tokens, in order; −1 in the places left over: bags_BT."""
    inside_BT = tokens.mask_BT.bool() & (tokens.mask_BT.cumsum(1) > start)
    ids_BT = tokens.ids_BT.masked_fill(~inside_BT, -1).sort(1).values
    again_BT = torch.zeros_like(inside_BT)
    again_BT[:, 1:] = ids_BT[:, 1:] == ids_BT[:, :-1]
    return ids_BT.masked_fill(again_BT, -1)


def mask_token_id(backbone: Backbone, asked: str | None) -> int:
    """Id of the token that stands in for a masked one.

    Args:
        backbone: its tokenizer is asked.
        asked: the token, as an entry of the vocabulary or as text; None = the tokenizer's own mask token, else `_`.

    Raises:
        BackboneError: it is not one token.
    """
    tokenizer = backbone.tokenizer
    if asked is None and tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    token = MASK_TOKEN if asked is None else asked
    if (entry := tokenizer.get_vocab().get(token)) is not None:
        return int(entry)
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise BackboneError(
            f"the mask token {token!r} is not one token",
            where=backbone.name,
            expected="one token of its tokenizer",
            found=len(ids),
            fix="set pretext.mask_token to a token of its vocabulary",
        )
    return int(ids[0])

"""EBAE and EBAR, Llama2Vec (arXiv 2312.15503): one state tells a bag of tokens, without memory."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2comp.model.tokens import SplitTexts, Tokens, wrap
from llm2comp.objectives.kl import chunked_bag_entropy
from llm2comp.objectives.loss import Mean, Passes


def loss(passes: Passes, mean: Mean) -> Tensor:
    """Half EBAE, half EBAR: −log g_φ(t given the state of a prompt's last token).

    t is each distinct token of a target: with the prompt `itself` around the context the context's
    tokens (without BOS), with `next` the continuation's. Under `sample_mean` each bag has its mean
    and the two weigh 1/2 each, as released; under `token_mean` all tokens weigh alike.
    """
    backbone, batch = passes.backbone, passes.batch
    bos = backbone.bos_id is not None
    share = 2.0 if mean.weighting == "sample_mean" else 1.0
    terms = []
    for prompt, bags_BT in zip(passes.stage.prompts, both_bags(batch, bos), strict=True):
        tokens = wrap(batch.context, *backbone.around(prompt), bos)
        last_BT = torch.zeros_like(tokens.mask_BT, dtype=torch.bool)
        last_BT[:, -1] = True
        states_BD = passes.text_states(tokens, last_BT)[:, -1]
        weights_B = mean.text_weights((bags_BT >= 0).sum(1)) / share
        terms.append(chunked_bag_entropy(states_BD, bags_BT, backbone.project, weights_B))
    return torch.stack(terms).sum()


def positions(batch: SplitTexts, bos: bool) -> int:
    """The tokens of all bags."""
    return sum(int((bags_BT >= 0).sum()) for bags_BT in both_bags(batch, bos))


def both_bags(batch: SplitTexts, bos: bool) -> tuple[Tensor, Tensor]:
    """What EBAE and EBAR must predict: bags of the contexts (but BOS) and of the continuations."""
    return bag_ids(batch.context, int(bos)), bag_ids(batch.continuation, 0)


def bag_ids(tokens: Tokens, start: int) -> Tensor:
    """Each text's distinct token ids after its first `start` tokens, in order: bags_BT.

    The places left over hold −1.
    """
    inside_BT = tokens.mask_BT.bool() & (tokens.mask_BT.cumsum(1) > start)
    ids_BT = tokens.ids_BT.masked_fill(~inside_BT, -1).sort(1).values
    again_BT = torch.zeros_like(inside_BT)
    again_BT[:, 1:] = ids_BT[:, 1:] == ids_BT[:, :-1]
    return ids_BT.masked_fill(again_BT, -1)

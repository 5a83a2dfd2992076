"""The paper's NLL (arXiv 2511.17129): the decoder goes on with the text, given memory alone."""

from __future__ import annotations

from torch import Tensor

from llm2comp.model.tokens import SplitTexts, Tokens
from llm2comp.objectives.kl import chunked_cross_entropy
from llm2comp.objectives.loss import Decoder, Mean


def loss(decoder: Decoder, mean: Mean) -> Tensor:
    """−log g_φ(n_j given memory, n_{a+1}..n_{j−1}), j = a+1..L."""
    student_BCD, _ = decoder.continuation
    return nll(student_BCD, decoder.passes.batch.continuation, decoder, mean)


def positions(batch: SplitTexts, bos: bool) -> int:
    """The continuations' tokens."""
    return int(batch.continuation.mask_BT.sum())


def nll(student_BCD: Tensor, text: Tokens, decoder: Decoder, mean: Mean) -> Tensor:
    """−log p of each token of a text, given the decoder's states behind memory and text."""
    valid_BC = text.mask_BT.bool()
    student_ND, targets_N = student_BCD[:, :-1][valid_BC], text.ids_BT[valid_BC]
    weights_N = mean.position_weights(text.lengths_B)
    return chunked_cross_entropy(student_ND, targets_N, decoder.passes.backbone.project, weights_N)

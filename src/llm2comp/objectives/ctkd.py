"""Continuation with knowledge distillation, the paper's CTKD (arXiv 2511.17129).

The decoder has the memory states and the continuation, the teacher the full text. Compared are the
L − a + 1 positions that predict n_{a+1}..n_L and the token after n_L.
"""

from __future__ import annotations

from torch import Tensor

from llm2comp.model.tokens import SplitTexts
from llm2comp.objectives.kl import chunked_kl
from llm2comp.objectives.loss import Decoder, Mean


def loss(decoder: Decoder, mean: Mean) -> Tensor:
    """KL(teacher on the full text ‖ decoder on memory and continuation)."""
    passes = decoder.passes
    student_BCD, valid_BC = decoder.continuation
    weights_N = mean.position_weights(passes.batch.continuation.lengths_B + 1)
    project, temperature = passes.backbone.project, passes.stage.temperature
    return chunked_kl(student_BCD[valid_BC], passes.teacher_ND, project, weights_N, temperature)


def positions(batch: SplitTexts, bos: bool) -> int:
    """The continuations' tokens, and the one after each."""
    return int((batch.continuation.lengths_B + 1).sum())

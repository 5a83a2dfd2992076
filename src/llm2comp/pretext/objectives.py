"""Stage 1's loss, a weighted sum of objectives of two kinds; and the compression objectives, the first kind.

From memory: memory states in, decoder's loss out. What every such objective does on one
copy of the weights:
1. encode the contexts to memory states, adapters on
2. detach them into a leaf; the frozen decoder works from BOS, the leaf and the continuation, adapters off
3. loss → gradient of the leaf; the decoder's graph is freed here
4. return a scalar with the loss's value whose gradient is the leaf's, carried into the encoder

From memory, but against a teacher's embedding: `alignment`; plain autograd too (`response.py`).

From text: the text's own states in the encoder pass must predict tokens; plain autograd (`from_text.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llm2comp.backbone import Backbone
from llm2comp.compressor import Compressor
from llm2comp.memory import embedding_from_memory
from llm2comp.pretext.from_text import both_bags, ebae_ebar_from_text, mntp_from_text
from llm2comp.pretext.kl import chunked_cross_entropy, chunked_kl
from llm2comp.pretext.weighting import Weighting, position_weights
from llm2comp.recipe.stages import BagPrompts
from llm2comp.tokens import NOT_MASKED, SplitTexts, Tokens

# compressor, memory leaf, batch, weighting, items, temperature → loss
FromMemory = Callable[[Compressor, Tensor, SplitTexts, Weighting, float, float], Tensor]
# compressor, batch, weighting, items, prompts → loss
FromText = Callable[[Compressor, SplitTexts, Weighting, float, BagPrompts], Tensor]


def pretext_loss(
    compressor: Compressor,
    batch: SplitTexts,
    objectives: Mapping[str, float],
    weightings: Mapping[str, Weighting],
    items: Mapping[str, float],
    temperature: float = 1.0,
    prompts: BagPrompts | None = None,
    align: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss of stage 1: the weighted sum of one or several objectives; those from memory share one encoding.

    Args:
        compressor: encoder; its frozen LM is teacher and decoder.
        batch: B texts, each split into context and continuation; for `mntp` with masks.
        objectives: weight by name, as in `FROM_MEMORY` and `FROM_TEXT`.
        weightings: by name: mean over a sample's positions, then over samples (release), or mean over all positions.
        items: by name: samples (or positions) that the mean runs over; more than this batch holds under accumulation.
        temperature: of both distributions in `ctkd`.
        prompts: of `ebae_ebar`; None = as published.
        align: embedding_BD → the loss of `alignment` (`response.py`), where it is among the objectives.
    """

    def loss_from(memory_BKD: Tensor) -> Tensor:
        terms = [
            weight * FROM_MEMORY[name](compressor, memory_BKD, batch, weightings[name], items[name], temperature)
            for name, weight in objectives.items()
            if name in FROM_MEMORY
        ]
        return torch.stack(terms).sum()

    prompts = prompts or BagPrompts()
    terms = [
        weight * FROM_TEXT[name](compressor, batch, weightings[name], items[name], prompts)
        for name, weight in objectives.items()
        if name in FROM_TEXT
    ]
    if len(terms) < len(objectives):
        memory_BKD = compressor.encode(batch.context)
        if FROM_MEMORY.keys() & objectives.keys():
            nested = [two_step(memory_BKD[:, :first], loss_from) for first in compressor.prefixes]
            terms.append(torch.stack(nested).mean())
        if align is not None:
            weights_K = compressor.get_buffer("weights_K")
            terms.append(objectives[ALIGNMENT] * align(embedding_from_memory(memory_BKD, weights_K)))
    return torch.stack(terms).sum()


def ctkd_from_memory(
    compressor: Compressor, memory_BKD: Tensor, batch: SplitTexts, weighting: Weighting, items: float, temperature: float
) -> Tensor:
    """Continuation with knowledge distillation: KL(teacher on the full text ‖ decoder on memory and continuation).

    Compared are the L − a + 1 positions that predict n_{a+1}..n_L and the token after n_L.
    """
    teacher_ND = teacher_states(compressor.backbone, batch)
    student_BCD, valid_BC = decode_from_memory(compressor, memory_BKD, batch.continuation)
    weights_N = position_weights(batch.continuation.lengths_B + 1, weighting, items)
    return chunked_kl(student_BCD[valid_BC], teacher_ND, compressor.backbone.project, weights_N, temperature)


def continuation_from_memory(
    compressor: Compressor, memory_BKD: Tensor, batch: SplitTexts, weighting: Weighting, items: float, temperature: float
) -> Tensor:
    """The paper's NLL: −log g_φ(n_j given memory, n_{a+1}..n_{j−1}), j = a+1..L."""
    return _nll(compressor, memory_BKD, batch.continuation, weighting, items)


def reconstruction_from_memory(
    compressor: Compressor, memory_BKD: Tensor, batch: SplitTexts, weighting: Weighting, items: float, temperature: float
) -> Tensor:
    """The paper's RC: −log g_φ(n_j given memory, n_1..n_{j−1}) over the context itself, its BOS (if any) given."""
    skipped = int(compressor.backbone.bos_id is not None)
    rows = [ids[mask.bool()][skipped:].tolist() for ids, mask in zip(batch.context.ids_BT, batch.context.mask_BT, strict=True)]
    text = Tokens.pad(rows, "right", compressor.backbone.pad_id).to(memory_BKD.device)
    return _nll(compressor, memory_BKD, text, weighting, items)


def _nll(compressor: Compressor, memory_BKD: Tensor, text: Tokens, weighting: Weighting, items: float) -> Tensor:
    student_BCD, _ = decode_from_memory(compressor, memory_BKD, text)
    valid_BC = text.mask_BT.bool()
    weights_N = position_weights(text.lengths_B, weighting, items)
    targets_N = text.ids_BT[valid_BC]
    return chunked_cross_entropy(student_BCD[:, :-1][valid_BC], targets_N, compressor.backbone.project, weights_N)


FROM_MEMORY: dict[str, FromMemory] = {
    "ctkd": ctkd_from_memory,
    "continuation": continuation_from_memory,
    "reconstruction": reconstruction_from_memory,
    "response": continuation_from_memory,
}
FROM_TEXT: dict[str, FromText] = {"mntp": mntp_from_text, "ebae_ebar": ebae_ebar_from_text}
OBJECTIVES = (*FROM_MEMORY, *FROM_TEXT)
ALIGNMENT = "alignment"
DEFAULT_WEIGHTING: dict[str, Weighting] = {
    "ctkd": "sample_mean",
    "continuation": "token_mean",
    "reconstruction": "token_mean",
    "mntp": "token_mean",
    "ebae_ebar": "sample_mean",
    "response": "token_mean",
    ALIGNMENT: "sample_mean",
}


def count_items(objective: str, weighting: Weighting, batch: Mapping[str, Tensor], bos: bool) -> int:
    """What a mean of this weighting runs over in one batch of `SplitTexts.to_tensors`: samples, or compared positions."""
    samples = len(batch["continuation_mask"])
    if weighting == "sample_mean" or objective == ALIGNMENT:
        return samples
    if objective == "reconstruction":
        return int(batch["context_mask"].sum()) - samples * bos
    if objective == "mntp":
        return int((batch["replaced"] != NOT_MASKED).sum())
    if objective == "ebae_ebar":
        return sum(int((bags_BT >= 0).sum()) for bags_BT in both_bags(SplitTexts.from_tensors(dict(batch)), bos))
    return int(batch["continuation_mask"].sum()) + (samples if objective == "ctkd" else 0)


@torch.no_grad()
def teacher_states(backbone: Backbone, batch: SplitTexts, skipped: int = 0) -> Tensor:
    """States of the frozen LM on the full texts, from the context's last token on (`skipped` tokens later), teacher_ND."""
    places_BT = torch.arange(batch.text.ids_BT.shape[1], device=batch.text.ids_BT.device)[None]
    first_B1 = batch.context.lengths_B[:, None] - 1 + skipped
    needed_BT = (places_BT >= first_B1) & batch.text.mask_BT.bool()
    return backbone.decode(backbone.embed(batch.text.ids_BT), batch.text.mask_BT, needed_BT)[needed_BT]


def decode_from_memory(compressor: Compressor, memory_BKD: Tensor, text: Tokens) -> tuple[Tensor, Tensor]:
    """Frozen decoder on BOS (if any), memory, text (right-padded): states from the last memory token on, and their mask.

    Returns:
        states_BCD with C + 1 places (place 0 predicts the text's first token), valid_BC bool.
    """
    backbone = compressor.backbone
    x = torch.cat([memory_BKD, backbone.embed(text.ids_BT).to(memory_BKD.dtype)], 1)
    mask = torch.cat([text.mask_BT.new_ones(memory_BKD.shape[:2]), text.mask_BT], 1)
    if backbone.bos_id is not None:
        bos_B1 = text.ids_BT.new_full((len(x), 1), backbone.bos_id)
        x = torch.cat([backbone.embed(bos_B1).to(x.dtype), x], 1)
        mask = torch.cat([mask.new_ones(len(x), 1), mask], 1)
    start = x.shape[1] - text.ids_BT.shape[1] - 1
    return backbone.decode(x, mask)[:, start:], mask[:, start:].bool()


def two_step(memory_BKD: Tensor, loss_from: Callable[[Tensor], Tensor]) -> Tensor:
    """Value of the loss, gradient through the memory states alone (module docstring, steps 2 to 4)."""
    if not torch.is_grad_enabled():
        return loss_from(memory_BKD)
    leaf = memory_BKD.detach().requires_grad_()
    loss = loss_from(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    carried = (memory_BKD * gradient).sum(dtype=loss.dtype)
    return loss.detach() + carried - carried.detach()

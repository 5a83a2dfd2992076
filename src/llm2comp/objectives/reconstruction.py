"""The paper's RC (arXiv 2511.17129): the decoder repeats the context, given memory alone."""

from __future__ import annotations

from torch import Tensor

from llm2comp.model.tokens import SplitTexts, Tokens
from llm2comp.objectives.continuation import nll
from llm2comp.objectives.loss import Decoder, Mean


def loss(decoder: Decoder, mean: Mean) -> Tensor:
    """−log g_φ(n_j given memory, n_1..n_{j−1}) over the context, whose BOS (if any) is given."""
    context, backbone = decoder.passes.batch.context, decoder.passes.backbone
    skipped = int(backbone.bos_id is not None)
    pairs = zip(context.ids_BT, context.mask_BT, strict=True)
    rows = [ids[mask.bool()][skipped:].tolist() for ids, mask in pairs]
    text = Tokens.pad(rows, "right", backbone.pad_id).to(decoder.memory_BKD.device)
    return nll(decoder.decode(text)[0], text, decoder, mean)


def positions(batch: SplitTexts, bos: bool) -> int:
    """The contexts' tokens but BOS."""
    return int((batch.context.lengths_B - int(bos)).sum())

"""Context recovered: how much of a context's effect on the frozen LM the memory states keep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm2comp.errors import DataError
from llm2comp.model.compressor import Compressor
from llm2comp.model.tokens import SplitTexts, Tokens, split_site
from llm2comp.objectives.kl import chunked_kl
from llm2comp.objectives.loss import decode_from_memory, teacher_states

# Texts of a sample at most, texts at once, and tokens that stay on either side of a split.
SAMPLE, BATCH, SITE_MARGIN = 64, 8, 10


@torch.no_grad()
def context_kl(compressor: Compressor, batch: SplitTexts) -> tuple[float, float, int]:
    """KL of the teacher (full text) to the decoder with memory, and to that without context.

    Sums in nats over the positions that predict the continuation and the token after it, and their
    number. Without a BOS token nothing stands before a continuation that has lost its context, so
    its first token is left out of both.
    """
    backbone = compressor.backbone
    skipped = int(backbone.bos_id is None)
    teacher_ND = teacher_states(backbone, batch, skipped)

    def kl_from(memory_BKD: Tensor) -> float:
        states_BCD, valid_BC = _predicting_states(compressor, memory_BKD, batch.continuation)
        weights_N = torch.ones(len(teacher_ND), device=teacher_ND.device)
        return float(chunked_kl(states_BCD[valid_BC], teacher_ND, backbone.project, weights_N))

    memory_BKD = compressor.memory_states(batch.context)
    return kl_from(memory_BKD), kl_from(memory_BKD[:, :0]), len(teacher_ND)


def _predicting_states(
    compressor: Compressor, memory_BKD: Tensor, text: Tokens
) -> tuple[Tensor, Tensor]:
    """Decoder states from the last token before the text on (without BOS: from its first token)."""
    if compressor.backbone.bos_id is not None:
        return decode_from_memory(compressor, memory_BKD, text)
    if memory_BKD.shape[1] == 0:
        embedded = compressor.backbone.embed(text.ids_BT)
        return compressor.backbone.decoder_pass(embedded, text.mask_BT), text.mask_BT.bool()
    states_BCD, valid_BC = decode_from_memory(compressor, memory_BKD, text)
    return states_BCD[:, 1:], valid_BC[:, 1:]


def split_sample(rows: Sequence[Sequence[int]], pad_id: int, seed: int = 0) -> list[SplitTexts]:
    """The first rows that are long enough, split at sites fixed by `seed`, in batches.

    A batch holds texts of like length.
    """
    sites = [(row, split_site(len(row), SITE_MARGIN, seed, i)) for i, row in enumerate(rows)]
    long = sorted(
        [(row, site) for row, site in sites if site is not None][:SAMPLE],
        key=lambda item: len(item[0]),
    )
    batches = [long[start : start + BATCH] for start in range(0, len(long), BATCH)]
    return [
        SplitTexts.from_rows([row for row, _ in part], [site for _, site in part], pad_id)
        for part in batches
    ]


def context_recovered(compressor: Compressor, batches: Sequence[SplitTexts]) -> float | None:
    """1 − KL(teacher ‖ decoder with memory) / KL(teacher ‖ decoder without); None: no batch.

    1: the memory is as good as the context; 0: no better than no context; below 0: it misleads.

    Raises:
        DataError: the context has no effect on the LM at all (both are the same).
    """
    if not batches:
        return None
    device = compressor.backbone.input_table.device
    sums = [context_kl(compressor, batch.to(device)) for batch in batches]
    with_memory, without = sum(s[0] for s in sums), sum(s[1] for s in sums)
    if not without > 1e-9:
        raise DataError(
            "the context has no effect on the LM",
            expected="KL without context above 0",
            found=without,
        )
    return 1.0 - with_memory / without

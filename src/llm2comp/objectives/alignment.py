"""Alignment to a teacher's embedding of the LM's response: LLM2Vec-Gen's second loss (2603.10913).

The paper's embedding runs through a linear map first: `encoder.projection`, a part of the encoder.
Without it the embedding is the plain mean of the memory states, and where the teacher's width is
another a map stands between them, which belongs to the training alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from llm2comp.errors import RecipeError
from llm2comp.model.memory import embedding_from_memory
from llm2comp.model.tokens import SplitTexts
from llm2comp.objectives.loss import Mean, Passes

MAP_FILE = "alignment.safetensors"


def loss(passes: Passes, mean: Mean) -> Tensor:
    """`alignment_loss` of the contexts' embeddings, before the encoder's own projection if any."""
    teacher_BD = passes.batch.teacher_BD
    if teacher_BD is None:
        raise ValueError("expected a batch with a teacher's embeddings (teacher_BD), got none")
    compressor, kind = passes.compressor, passes.stage.alignment_loss
    embedding_BD = embedding_from_memory(passes.memory_BKD, compressor.get_buffer("weights_K"))
    to_teacher = compressor.projection or passes.to_teacher
    return alignment_loss(embedding_BD, teacher_BD, mean.items, kind, to_teacher)


def positions(batch: SplitTexts, bos: bool) -> int:
    """One embedding per text."""
    return len(batch.text.ids_BT)


def alignment_loss(
    embedding_BD: Tensor,
    teacher_BD: Tensor,
    items: float,
    kind: Literal["mse", "cosine"],
    to_teacher: nn.Linear | None = None,
) -> Tensor:
    """Distance of texts' embeddings to a teacher's embeddings of their responses, mean over texts.

    Args:
        embedding_BD: embeddings of the texts; the gradient goes here.
        teacher_BD: embeddings of the responses; of another width only with `to_teacher`.
        items: texts that the mean runs over; more than this batch holds under accumulation.
        kind: `mse`, the paper's: squared difference, mean over dimensions; `cosine`: 1 − cosine.
        to_teacher: trained map into the teacher's space: the encoder's projection, or that of
            `map_to_teacher`.
    """
    if to_teacher is not None:
        embedding_BD = to_teacher(embedding_BD)
    embedding_BD, teacher_BD = embedding_BD.float(), teacher_BD.float()
    if kind == "mse":
        losses_B = (embedding_BD - teacher_BD).square().mean(1)
    else:
        losses_B = 1.0 - functional.cosine_similarity(embedding_BD, teacher_BD, dim=1)
    return losses_B.sum() / items


def map_to_teacher(
    width: int,
    teacher_width: int,
    seed: int,
    device: torch.device,
    projection: nn.Linear | None = None,
) -> nn.Linear | None:
    """The linear map that alignment needs beside the encoder, fixed by the seed.

    None where the widths are the same, or where the encoder's own projection is the map.

    Raises:
        RecipeError: the projection has another width than the teacher.
    """
    if projection is not None and projection.out_features != teacher_width:
        raise RecipeError(
            "the projection is not as wide as the teacher",
            where="encoder.projection",
            expected=teacher_width,
            found=projection.out_features,
            fix=f"set encoder.projection: {teacher_width}, or embed by a teacher of that width",
        )
    if projection is not None or width == teacher_width:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, teacher_width, device="cpu").to(device)

"""LLM2Vec-Gen (arXiv 2603.10913): memory that stands for the LM's response to a text, and for a teacher's embedding of it.

The response itself is learned by `continuation` or `ctkd` on rows whose continuation is the response. Here is the
second loss. The paper's embedding runs through a linear map first: `encoder.projection`, a part of the encoder. Without it the
embedding is the plain mean of the memory states, and where the teacher's width is another a map stands between them, which
belongs to the training alone.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from llm2comp.errors import RecipeError

AlignmentLoss = Literal["mse", "cosine"]
MAP_FILE = "alignment.safetensors"


def alignment_loss(
    embedding_BD: Tensor, teacher_BD: Tensor, items: float, kind: AlignmentLoss, to_teacher: nn.Linear | None = None
) -> Tensor:
    """Distance between texts' embeddings and a teacher's embeddings of their responses, mean over samples.

    Args:
        embedding_BD: embeddings of the texts; the gradient goes here.
        teacher_BD: embeddings of the responses; of another width only with `to_teacher`.
        items: samples that the mean runs over; more than this batch holds under accumulation.
        kind: `mse`, the paper's: squared difference, mean over dimensions; or `cosine`: 1 − cosine.
        to_teacher: trained map into the teacher's space: the encoder's projection, or that of `map_to_teacher`.
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
    width: int, teacher_width: int, seed: int, device: torch.device, projection: nn.Linear | None = None
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
            fix=f"set encoder.projection: {teacher_width}, or embed the responses by a teacher of that width",
        )
    if projection is not None or width == teacher_width:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, teacher_width, device="cpu").to(device)

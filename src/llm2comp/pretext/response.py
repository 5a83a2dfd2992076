"""LLM2Vec-Gen (arXiv 2603.10913): memory that stands for the LM's response to a text, and for a teacher's embedding of it.

The response itself is learned by `continuation` or `ctkd` on rows whose continuation is the response (METHOD 3). Here is the
second loss. The paper's embedding runs through a linear map first; ours is the plain mean of the memory states, and the map
stands between only where the teacher's width is another, so that what is exported needs none.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

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
        to_teacher: trained map into the teacher's space.
    """
    if to_teacher is not None:
        embedding_BD = to_teacher(embedding_BD)
    embedding_BD, teacher_BD = embedding_BD.float(), teacher_BD.float()
    if kind == "mse":
        losses_B = (embedding_BD - teacher_BD).square().mean(1)
    else:
        losses_B = 1.0 - functional.cosine_similarity(embedding_BD, teacher_BD, dim=1)
    return losses_B.sum() / items


def map_to_teacher(width: int, teacher_width: int, seed: int, device: torch.device) -> nn.Linear | None:
    """The linear map that alignment needs, fixed by the seed: none where the widths are the same."""
    if width == teacher_width:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(width, teacher_width, device="cpu").to(device)

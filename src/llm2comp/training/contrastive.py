"""Stages 2 and 3 (UCL, SCL): stock sentence-transformers losses over the memory encoder."""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim
from torch import Tensor, nn

from llm2comp.errors import RecipeError
from llm2comp.recipe import ContrastiveStage, UclStage


def shifted_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine minus 1.

    InfoNCE is the same under any shift of the scores, but the stock loss is `logsumexp(scores) − positive score`: with
    scores of 1 / temperature = 20 the difference of two float32 numbers near 20 loses all but six digits of a small loss
    (5 % of the release's UCL value). With the positives' scores near 0 nothing cancels.
    """
    similarity: Tensor = cos_sim(a, b)
    return similarity - 1.0


def contrastive_loss(model: SentenceTransformer, stage: ContrastiveStage) -> nn.Module:
    """InfoNCE over cosine with in-batch (and hard) negatives of all devices, temperature from the stage (METHOD 2).

    `denominator: both_views` also counts the other first views (the poster's 2B). `mini_batch_size` switches to GradCache,
    which keeps the gradient of the whole batch. `matryoshka_dims` adds the same loss on the embedding's first dimensions
    (Matryoshka representation learning, arXiv 2205.13147).

    Raises:
        RecipeError: more Matryoshka dimensions than the embedding has.
    """
    both_views = isinstance(stage, UclStage) and stage.denominator == "both_views"
    settings: dict[str, Any] = {
        "scale": 1.0 / stage.temperature,
        "similarity_fct": shifted_cosine,
        "directions": ("query_to_doc", "query_to_query") if both_views else ("query_to_doc",),
        "gather_across_devices": torch.distributed.is_initialized(),
    }
    loss: nn.Module
    if stage.mini_batch_size is None:
        loss = losses.MultipleNegativesRankingLoss(model, **settings)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=stage.mini_batch_size, **settings)
    if not stage.matryoshka_dims:
        return loss
    width = int(model.get_embedding_dimension() or 0)
    if too_wide := [dim for dim in stage.matryoshka_dims if dim > width]:
        raise RecipeError(
            "more dimensions than the model has", where="matryoshka_dims", expected=f"up to {width}", found=too_wide
        )
    return losses.MatryoshkaLoss(model, loss, matryoshka_dims=sorted({width, *stage.matryoshka_dims}, reverse=True))

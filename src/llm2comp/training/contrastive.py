"""Stages 2 and 3 (UCL, SCL): stock sentence-transformers losses over the memory encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim
from torch import Tensor, nn

from llm2comp.encoder import MemoryEncoder
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


class GradCache(losses.CachedMultipleNegativesRankingLoss):
    """The stock loss, which knows padding behind a text only, over texts that are padded in front.

    A batch's rows are sorted by length, the longest first (the loss does not depend on their order), and each mini-batch
    leaves out the columns in front that are padding for all of its texts.
    """

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any = None) -> Tensor:
        """Loss of a batch; its backward pass encodes the mini-batches again."""
        columns = list(sentence_features)
        order_B = torch.stack([column["attention_mask"].sum(1) for column in columns]).sum(0).argsort(descending=True)
        loss: Tensor = super().forward([_each_tensor(column, lambda x: x[order_B]) for column in columns], labels)
        return loss

    def embed_minibatch(self, sentence_feature: dict[str, Any], begin: int, end: int, *args: Any, **kwargs: Any) -> Any:
        """Embeddings of rows `begin` to `end`, and the random state they were drawn with."""
        rows = _each_tensor(sentence_feature, lambda x: x[begin:end])
        first = int(rows["attention_mask"].any(0).int().argmax())
        return super().embed_minibatch(_each_tensor(rows, lambda x_BT: x_BT[:, first:]), 0, end - begin, *args, **kwargs)


def _each_tensor(features: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in features.items()}


def contrastive_loss(model: SentenceTransformer, stage: ContrastiveStage) -> nn.Module:
    """InfoNCE over cosine with in-batch (and hard) negatives of all devices, temperature from the stage.

    `denominator: both_views` also counts the other first views (the poster's 2B). `mini_batch_size` or `mini_batch_tokens`
    switches to GradCache, which keeps the gradient of the whole batch. `matryoshka_dims` adds the same loss on the embedding's
    first dimensions (Matryoshka representation learning, arXiv 2205.13147), summed. Nested memory makes it the mean over the
    embeddings of the first j memory states, each text encoded once.

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
    if stage.mini_batch_size is None and stage.mini_batch_tokens is None:
        loss = losses.MultipleNegativesRankingLoss(model, **settings)
    else:
        size = stage.mini_batch_size or stage.batch_size
        loss = GradCache(model, mini_batch_size=size, mini_batch_num_tokens=stage.mini_batch_tokens, **settings)
    module: Any = model[0]
    if len(module.compressor.prefixes) > 1:
        nest(loss, module)
    if not stage.matryoshka_dims:
        return loss
    width = int(model.get_embedding_dimension() or 0)
    if too_wide := [dim for dim in stage.matryoshka_dims if dim > width]:
        raise RecipeError(
            "more dimensions than the model has", where="matryoshka_dims", expected=f"up to {width}", found=too_wide
        )
    return losses.MatryoshkaLoss(model, loss, matryoshka_dims=sorted({width, *stage.matryoshka_dims}, reverse=True))


def nest(loss: nn.Module, module: MemoryEncoder) -> None:
    """Make a stock loss the mean of itself over the nested memory's prefixes; the module then gives embeddings_BPD.

    Only the step from embeddings to the loss is repeated. GradCache's form of it goes backward by itself, prefix by prefix,
    into the cached embeddings: there each prefix's gradient is divided on its way.
    """
    module.prefixes = module.compressor.prefixes
    count = len(module.prefixes)
    cached = uses_gradient_cache(loss)
    name = "calculate_loss" if cached else "compute_loss_from_embeddings"
    once: Callable[..., Tensor] = getattr(loss, name)

    def prefix(x_BPD: Tensor, place: int) -> Tensor:
        x_BD = x_BPD[:, place]
        if cached and x_BD.requires_grad:
            x_BD.register_hook(lambda gradient_BD: gradient_BD / count)
        return x_BD

    def mean(columns: list[Any], *args: Any, **kwargs: Any) -> Tensor:
        losses_P = []
        for place in range(count):
            part = [[prefix(x, place) for x in column] if cached else prefix(column, place) for column in columns]
            losses_P.append(once(part, *args, **kwargs))
        return torch.stack(losses_P).mean()

    setattr(loss, name, mean)

"""Stages 2 and 3 (UCL, SCL): stock sentence-transformers losses over the memory encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from llm2comp.errors import RecipeError
from llm2comp.model.encoder import MemoryEncoder
from llm2comp.model.judges import Judges, Targets
from llm2comp.recipe import ContrastiveStage, SclStage, UclStage


def shifted_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine minus 1.

    InfoNCE is the same under any shift of the scores, but the stock loss is `logsumexp(scores) −
    positive score`: with scores of 1 / temperature = 20 the difference of two float32 numbers near
    20 loses all but six digits of a small loss (5 % of the release's UCL value). With the
    positives' scores near 0 nothing cancels.
    """
    similarity: Tensor = cos_sim(a, b)
    return similarity - 1.0


class GradCache(losses.CachedMultipleNegativesRankingLoss):
    """The stock loss, which knows padding behind a text only, over texts that are padded in front.

    A batch's rows are sorted by length, the longest first (the loss does not depend on their
    order), and each mini-batch leaves out the columns in front that are padding for all of its
    texts. Labels are None, or `Targets`, which are sorted likewise.
    """

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any = None) -> Tensor:
        """Loss of a batch; its backward pass encodes the mini-batches again."""
        columns = list(sentence_features)
        order_B = (
            torch.stack([column["attention_mask"].sum(1) for column in columns])
            .sum(0)
            .argsort(descending=True)
        )
        labels = None if labels is None else labels.ordered(order_B)
        loss: Tensor = super().forward(
            [_each_tensor(column, lambda x: x[order_B]) for column in columns], labels
        )
        return loss

    def embed_minibatch(
        self, sentence_feature: dict[str, Any], begin: int, end: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Embeddings of rows `begin` to `end`, and the random state they were drawn with."""
        rows = _each_tensor(sentence_feature, lambda x: x[begin:end])
        first = int(rows["attention_mask"].any(0).int().argmax())
        return super().embed_minibatch(
            _each_tensor(rows, lambda x_BT: x_BT[:, first:]), 0, end - begin, *args, **kwargs
        )


def judged_loss(
    queries_MD: Tensor, documents_ND: Tensor, first: int, targets: Targets, stage: SclStage
) -> Tensor:
    """Loss of queries `first` to `first` + M of a batch, summed: InfoNCE without the guide's false
    negatives, and weight · KL(teacher ‖ ours) over the documents.

    As sentence-transformers' GISTEmbedLoss without its contrasts among queries and among positives,
    which our InfoNCE has not either. That loss decodes ids, where ours stand behind an instruction.
    """
    rows = slice(first, first + len(queries_MD))
    with torch.autocast(queries_MD.device.type, enabled=False):
        wide = torch.promote_types(queries_MD.dtype, torch.float32)
        cos_MN = shifted_cosine(queries_MD.to(wide), documents_ND.to(wide))
        own_M = torch.arange(first, first + len(queries_MD), device=cos_MN.device)
        scores_MN = cos_MN / stage.temperature
        if targets.guide_BN is not None and stage.guide is not None:
            guide_MN = targets.guide_BN[rows]
            nearer_MN = guide_MN > guide_MN.gather(1, own_M[:, None]) - stage.guide.margin
            scores_MN = scores_MN.masked_fill(
                nearer_MN.scatter(1, own_M[:, None], False), -torch.inf
            )
        loss = cross_entropy(scores_MN, own_M, reduction="sum")
        if targets.teacher_BN is not None and stage.teacher is not None:
            ours_MN = (
                cos_MN / (stage.teacher.student_temperature or stage.temperature)
            ).log_softmax(1)
            teacher_MN = (
                (targets.teacher_BN[rows] / stage.teacher.temperature).to(wide).log_softmax(1)
            )
            divergence = kl_div(ours_MN, teacher_MN, reduction="sum", log_target=True)
            loss = loss + stage.teacher.weight * divergence
    return loss


class JudgedLoss(losses.MultipleNegativesRankingLoss):
    """`judged_loss` as the mean over the batch; its labels are `Targets`."""

    def __init__(self, *args: Any, stage: SclStage, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage = stage

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        """Embeddings per column, queries first."""
        queries_BD, *documents = embeddings
        return judged_loss(queries_BD, torch.cat(documents), 0, labels, self.stage) / len(
            queries_BD
        )


class JudgedGradCache(GradCache):
    """`JudgedLoss` by mini-batches, its gradient that of the whole batch."""

    def __init__(self, *args: Any, stage: SclStage, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage = stage

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False
    ) -> Tensor:
        """Embeddings per column and mini-batch; `mini_batch_size` rows of scores at once."""
        queries_BD, *documents = (torch.cat(column) for column in reps)
        documents_ND, parts = torch.cat(documents), []
        for first in range(0, len(queries_BD), self.mini_batch_size):
            queries_MD = queries_BD[first : first + self.mini_batch_size]
            part = judged_loss(queries_MD, documents_ND, first, labels, self.stage) / len(
                queries_BD
            )
            if with_backward:
                part.backward()
            parts.append(part.detach() if with_backward else part)
        return torch.stack(parts).sum()


class Asking(nn.Module):
    """A loss whose labels are what teacher and guide say of the batch: they are asked once."""

    def __init__(self, model: SentenceTransformer, loss: nn.Module, judges: Judges) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.uses_gradient_cache = uses_gradient_cache(loss)
        # A bound method, not a module: judges are not the loss's to train, move or save.
        self._targets = judges.targets

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Any = None) -> Tensor:
        """Loss of a batch whose features hold their `texts`."""
        features = [dict(column) for column in sentence_features]
        texts = [column.pop("texts") for column in features]
        targets = self._targets(texts, features[0]["input_ids"].device)
        loss: Tensor = self.loss(features, targets)
        return loss


def _each_tensor(features: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {
        name: change(value) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }


def contrastive_loss(
    model: SentenceTransformer, stage: ContrastiveStage, judges: Judges | None = None
) -> nn.Module:
    """InfoNCE over cosine, negatives from all devices' batches, temperature from the stage.

    `denominator: both_views` also counts the other first views (the poster's 2B). `mini_batch_size`
    or `mini_batch_tokens` switches to GradCache, which keeps the gradient of the whole batch.
    `matryoshka_dims` adds the same loss on the embedding's first dimensions (Matryoshka
    representation learning, arXiv 2205.13147), summed. Nested memory makes it the mean over the
    embeddings of its prefixes (means of some memory states), each text encoded once. `judges` (a
    teacher, a guide) make it `judged_loss`; the model's features hold their texts from here on,
    which it needs.

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
    whole: Callable[..., nn.Module] = losses.MultipleNegativesRankingLoss
    cached: Callable[..., nn.Module] = GradCache
    if judges is not None:
        assert isinstance(stage, SclStage)
        whole, cached = partial(JudgedLoss, stage=stage), partial(JudgedGradCache, stage=stage)
    if stage.mini_batch_size is None and stage.mini_batch_tokens is None:
        loss = whole(model, **settings)
    else:
        size = stage.mini_batch_size or stage.batch_size
        loss = cached(
            model, mini_batch_size=size, mini_batch_num_tokens=stage.mini_batch_tokens, **settings
        )
    module: Any = model[0]
    module.keeps_texts = judges is not None
    if len(module.compressor.prefixes) > 1:
        nest(loss, module)
    if stage.matryoshka_dims:
        loss = matryoshka(model, loss, stage.matryoshka_dims)
    return loss if judges is None else Asking(model, loss, judges)


def matryoshka(model: SentenceTransformer, loss: nn.Module, dims: Sequence[int]) -> nn.Module:
    """The loss summed over first dimensions. Raises RecipeError: more than the embedding has."""
    width = int(model.get_embedding_dimension() or 0)
    if too_wide := [dim for dim in dims if dim > width]:
        raise RecipeError(
            "more dimensions than the model has",
            where="matryoshka_dims",
            expected=f"up to {width}",
            found=too_wide,
        )
    return losses.MatryoshkaLoss(model, loss, matryoshka_dims=sorted({width, *dims}, reverse=True))


def nest(loss: nn.Module, module: MemoryEncoder) -> None:
    """Make a stock loss its mean over the nested memory's prefixes.

    The module then gives embeddings_BPD.

    Only the step from embeddings to the loss is repeated. GradCache's form of it goes backward by
    itself, prefix by prefix, into the cached embeddings: there each prefix's gradient is divided on
    its way.
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
            part = [
                [prefix(x, place) for x in column] if cached else prefix(column, place)
                for column in columns
            ]
            losses_P.append(once(part, *args, **kwargs))
        return torch.stack(losses_P).mean()

    setattr(loss, name, mean)

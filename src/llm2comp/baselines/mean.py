"""The untouched LM, mean-pooled: the average of its last states over a text's tokens (BOS left out)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from llm2comp.backbone import Backbone
from llm2comp.tokens import Tokens


class MeanEncoder(InputModule):
    """Causal LM, adapters off, mean over text tokens."""

    def __init__(self, backbone: Backbone, max_tokens: int = 512) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backbone = backbone
        self.max_tokens = min(max_tokens, backbone.max_positions or max_tokens)
        self.tokenizer = backbone.tokenizer

    def get_embedding_dimension(self) -> int:
        """D."""
        return int(self.backbone.embedding_table.shape[1])

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Texts as right-padded token ids."""
        rows = self.backbone.tokenise([(prompt or "") + text for text in inputs], self.max_tokens)
        tokens = Tokens.pad(rows, "right", self.backbone.pad_id)
        return {"input_ids": tokens.ids_BT, "attention_mask": tokens.mask_BT}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, D)."""
        ids_BT, mask_BT = features["input_ids"], features["attention_mask"]
        states_BTD = self.backbone.decode(self.backbone.embed(ids_BT), mask_BT)
        weights_BT = mask_BT.clone()
        if self.backbone.bos_id is not None and ids_BT.shape[1] > 1:
            weights_BT[:, 0] = (mask_BT.sum(1) == 1).to(mask_BT)  # an empty text has nothing but its BOS
        weights_BT = weights_BT / weights_BT.sum(1, keepdim=True)
        features["sentence_embedding"] = torch.einsum("btd,bt->bd", states_BTD, weights_BT.to(states_BTD))
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Nothing is learned, so there is nothing to save."""
        raise NotImplementedError(
            "a mean-pooled backbone is the backbone itself: load it with SentenceTransformer and mean pooling"
        )


def mean_pooled(backbone: Backbone, max_tokens: int = 512) -> SentenceTransformer:
    """The baseline as a SentenceTransformer."""
    device = str(backbone.embedding_table.device)
    return SentenceTransformer(modules=[MeanEncoder(backbone, max_tokens)], device=device).eval()

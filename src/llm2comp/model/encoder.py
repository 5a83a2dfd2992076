"""The Compressor as sentence-transformers' first module, and the stage folders it lives in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.sentence_transformer.modules import Transformer, WordWeights

from llm2comp.errors import DataError, RecipeError
from llm2comp.model.backbone import Backbone
from llm2comp.model.compressor import Compressor
from llm2comp.model.memory import prefix_embeddings
from llm2comp.model.tokens import Tokens, limit_of

NO_LIMIT = 10**9
# Tokens that a prompt must leave to the text behind it.
LEAST_ROOM = 4


class MemoryEncoder(InputModule):
    """Texts → embeddings, for `SentenceTransformer(modules=[MemoryEncoder(compressor)])`.

    Args:
        compressor: the encoder proper.
        max_tokens: longest text, BOS included, memory not; longer ones are cut.
        role_max_tokens: other limits for the roles `query` and `document` (sentence-transformers'
            `task`).
    """

    def __init__(
        self,
        compressor: Compressor,
        max_tokens: int = 512,
        role_max_tokens: dict[str, int] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.compressor = compressor
        self.max_tokens = compressor.max_tokens(max_tokens)
        self.role_max_tokens = {
            role: compressor.max_tokens(n) for role, n in (role_max_tokens or {}).items()
        }
        self.tokenizer = compressor.backbone.tokenizer
        # Set by a nested loss: embeddings are then (B, P, D), the mean of so many memory states
        # for each number here, in the compressor's order.
        self.prefixes: tuple[int, ...] = ()
        # Set by a loss that shows the texts to another encoder: features then hold `texts`, too.
        self.keeps_texts = False

    @property
    def max_seq_length(self) -> int:
        """Positions of the longest input, memory and prompt included; may be set for all roles.

        None is the most that the LM takes. Raises BackboneError: a number that leaves no room for a
        text.
        """
        return self.max_tokens + self.compressor.added

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        added = self.compressor.added
        self.max_tokens = self.compressor.max_tokens(
            NO_LIMIT if value is None else limit_of(value, added + 2) - added
        )
        self.role_max_tokens = {}

    def get_embedding_dimension(self) -> int:
        """D, or what the projection makes of it."""
        return self.compressor.width

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Texts, after their prompt, as left-padded token ids. Errors as `rows`."""
        pad_id = self.compressor.backbone.pad_id
        tokens = Tokens.pad(self.rows(inputs, prompt, task), "left", pad_id)
        features = {"input_ids": tokens.ids_BT, "attention_mask": tokens.mask_BT}
        return features | {"texts": list(inputs)} if self.keeps_texts else features

    def rows(
        self, texts: Sequence[str], prompt: str | None = None, role: str | None = None
    ) -> list[list[int]]:
        """Token ids of texts after their prompt, BOS first, cut to the limit of the role.

        Raises:
            RecipeError: the prompt leaves a text no room.
        """
        backbone, limit = self.compressor.backbone, self.limit(role)
        if prompt:
            refuse_long_prompt(prompt, len(backbone.tokenise([prompt])[0]), limit)
        return backbone.tokenise([(prompt or "") + text for text in texts], limit)

    def limit(self, role: str | None = None) -> int:
        """Tokens of the longest text of a role, BOS and prompt included; longer ones are cut."""
        return self.role_max_tokens.get(role or "", self.max_tokens)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, D), or (B, P, D) under a nested loss."""
        compressor = self.compressor
        tokens = Tokens(features["input_ids"], features["attention_mask"])
        if self.prefixes:
            memory_BKD = compressor.memory_states(tokens)
            means_BPD = prefix_embeddings(memory_BKD, self.prefixes, compressor.order)
            features["sentence_embedding"] = compressor.project(means_BPD)
        else:
            features["sentence_embedding"] = compressor(tokens)
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Not this way: stages are saved by their trainer, whole encoders by `llm2comp.export`."""
        raise NotImplementedError("save a trained encoder with llm2comp.export(model, folder)")


def as_sentence_transformer(
    compressor: Compressor,
    max_tokens: int,
    role_max_tokens: dict[str, int] | None = None,
    prompts: dict[str, str] | None = None,
) -> SentenceTransformer:
    """A SentenceTransformer over a live compressor, whose module pools its memory states."""
    module = MemoryEncoder(compressor, max_tokens, role_max_tokens)
    device = str(compressor.backbone.input_table.device)
    model = SentenceTransformer(modules=[module], device=device, prompts=prompts or {})
    model.eval()
    return model


def to_dtype(model: SentenceTransformer, dtype: str) -> SentenceTransformer:
    """A model's parameters in another dtype (`auto`: as they are).

    Buffers stay (angles of positions need float32), and so do the weights of tokens.
    """
    if dtype != "auto":
        modules: Any = [module for module in model if not isinstance(module, WordWeights)]
        for parameter in (
            p for module in modules for p in module.parameters() if p.is_floating_point()
        ):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model


def merge_adapters(model: SentenceTransformer) -> None:
    """Put a live encoder's LoRA into the weights of a copy of its LM, which takes its place.

    This is faster, for encoding alone.

    No frozen LM is left to decode with. Other models, full copies and LMs in 4 or 8 bits stay as
    they are.
    """
    if not isinstance(module := model[0], MemoryEncoder):
        return
    backbone = module.compressor.backbone
    if backbone.adapters.faster_merged:
        lm = backbone.adapters.merged()
        module.compressor.backbone = Backbone(
            lm, backbone.tokenizer, backbone.attention, backbone.name, backbone.bos
        ).eval()


def refuse_long_prompt(prompt: str, tokens: int, limit: int, where: str = "prompt") -> None:
    """Raise RecipeError when a prompt leaves a text no room within `limit`, BOS counted.

    All embeddings would be one.
    """
    if tokens + LEAST_ROOM > limit:
        raise RecipeError(
            "the prompt leaves no room for a text",
            where=where,
            expected=f"{limit - LEAST_ROOM} tokens or fewer, within a limit of {limit}",
            found=f"{tokens}: {prompt if len(prompt) <= 80 else prompt[:77] + '...'!r}",
            fix="shorten the instruction, or raise the limit (scl.query_max_tokens, max_tokens)",
        )


def check_prompt(
    model: SentenceTransformer, prompt: str, role: str | None = None, where: str = "prompt"
) -> None:
    """`refuse_long_prompt` for any model, live or exported, whose limit is known."""
    module = model[0]
    if isinstance(module, MemoryEncoder):
        limit: int | None = module.limit(role)
        tokens = len(module.compressor.backbone.tokenise([prompt])[0])
    elif isinstance(module, Transformer):
        limit, tokens = (
            model.max_seq_length,
            len(model.tokenizer(prompt, verbose=False)["input_ids"]),
        )
    else:
        return
    if limit and prompt:
        refuse_long_prompt(prompt, tokens, limit, where)


def refuse_not_finite(
    embeddings_ND: NDArray[np.float32], texts: Sequence[str], where: str | None = None
) -> None:
    """Raise DataError unless all embeddings are finite.

    It names the text: by its number, if there is no better `where`.
    """
    bad = np.flatnonzero(~np.isfinite(embeddings_ND).all(1))
    if len(bad):
        raise DataError(
            "the embedding is not finite",
            where=where or f"text {bad[0] + 1}",
            found=f"{texts[bad[0]][:80]!r}"
            + (f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""),
            fix="check the model's weights; in half precision try float32",
        )

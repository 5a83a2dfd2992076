"""Stage 1's loss: the weighted sum of a recipe's objectives over one batch.

How the gradient of an objective that needs the decoder, such as CTKD, flows on one copy of the
weights:
1. the encoder, adapters on, reads the contexts: memory states
2. they are detached into a leaf; the frozen decoder, adapters off, reads BOS, the leaf and a text
3. loss → gradient of the leaf; the decoder's graph is freed here
4. `two_step` returns the loss's value with the leaf's gradient, which `backward` carries into the
   encoder

All other objectives are plain autograd through the encoder pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm2comp.model.backbone import Backbone
from llm2comp.model.compressor import Compressor
from llm2comp.model.memory import prefix_of
from llm2comp.model.tokens import SplitTexts, Tokens
from llm2comp.recipe import PretextStage
from llm2comp.recipe.objectives import OBJECTIVES, Weighting


@dataclass(frozen=True)
class Mean:
    """How losses of positions become one: a weighted sum over this batch.

    `items`: samples or positions that the mean runs over, more than the batch holds where the
    optimiser step has several batches.
    """

    weighting: Weighting
    items: float

    def text_weights(self, positions_B: Tensor) -> Tensor:
        """Weight of each of a text's positions: weights_B, float32.

        A text without positions adds nothing, though `sample_mean` counts it in `items`.
        """
        positions = positions_B.clamp_min(1).float()
        by_text = self.weighting == "sample_mean"
        return (positions.reciprocal() if by_text else torch.ones_like(positions)) / self.items

    def position_weights(self, positions_B: Tensor) -> Tensor:
        """`text_weights` for each gathered position: weights_N."""
        return self.text_weights(positions_B).repeat_interleave(positions_B)


@dataclass(frozen=True, eq=False)
class Passes:
    """A batch and the passes over it. Each runs when first asked for, and once for all who ask."""

    compressor: Compressor
    batch: SplitTexts
    stage: PretextStage
    to_teacher: nn.Linear | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen LM: teacher, decoder, head."""
        return self.compressor.backbone

    @cached_property
    def memory_BKD(self) -> Tensor:
        """Memory states of the contexts, adapters on."""
        return self.compressor.memory_states(self.batch.context)

    @cached_property
    def teacher_ND(self) -> Tensor:
        """`teacher_states` of the batch."""
        return teacher_states(self.backbone, self.batch)

    def text_states(self, tokens: Tokens, needed_BT: Tensor) -> Tensor:
        """The needed states of texts alone, adapters on, in the head's dtype: states_BTD."""
        x_BTD = self.compressor.embed(tokens.ids_BT)
        states_BTD = self.backbone.encoder_pass(x_BTD, tokens.mask_BT, needed_BT)
        return states_BTD.to(self.backbone.input_table.dtype)


@dataclass(frozen=True, eq=False)
class Decoder:
    """The frozen decoder behind one prefix of the memory states; teacher and batch are shared."""

    passes: Passes
    memory_BKD: Tensor

    @cached_property
    def continuation(self) -> tuple[Tensor, Tensor]:
        """`decode_from_memory` on the continuations."""
        return self.decode(self.passes.batch.continuation)

    def decode(self, text: Tokens) -> tuple[Tensor, Tensor]:
        """`decode_from_memory` on another right-padded text."""
        return decode_from_memory(self.passes.compressor, self.memory_BKD, text)


class Objective(Protocol):
    """What the file of an objective holds."""

    def loss(self, given: Any, mean: Mean) -> Tensor:
        """Loss of a batch, given its `Decoder` where the row needs one, else its `Passes`."""

    def positions(self, batch: SplitTexts, bos: bool) -> int:
        """What `token_mean` runs over in one batch; `bos`: whether each text begins with BOS."""


def objective(name: str) -> Objective:
    """The file of that name."""
    found: Any = importlib.import_module(f"llm2comp.objectives.{name}")
    return found  # type: ignore[no-any-return]


def count_items(stage: PretextStage, batch: SplitTexts, bos: bool) -> dict[str, int]:
    """By objective, what its mean runs over in one batch: samples, or positions."""
    found = dict.fromkeys(stage.objectives, len(batch.text.ids_BT))
    for name in stage.objectives:
        if stage.weighting_of(name) == "token_mean":
            found[name] = objective(name).positions(batch, bos)
    return found


def stage_loss(
    compressor: Compressor,
    batch: SplitTexts,
    stage: PretextStage,
    items: Mapping[str, float] | None = None,
    to_teacher: nn.Linear | None = None,
) -> Tensor:
    """The loss of one batch for stage 1, a scalar whose gradient reaches the encoder.

    Args:
        compressor: the encoder; its frozen LM is teacher and decoder.
        batch: B texts, split, with what the stage's objectives need.
        stage: objectives with their weights, and their settings.
        items: by objective, as `count_items`, over the whole optimiser step; None = this batch.
        to_teacher: map into the space of `alignment`'s teacher (`map_to_teacher`).
    """
    items = items or count_items(stage, batch, compressor.backbone.bos_id is not None)
    passes = Passes(compressor, batch, stage, to_teacher)

    def terms(given: Passes | Decoder, decoding: bool) -> list[Tensor]:
        return [
            weight * objective(name).loss(given, Mean(stage.weighting_of(name), items[name]))
            for name, weight in stage.objectives.items()
            if ("decoder" in OBJECTIVES[name].needs) == decoding
        ]

    def decoded(memory_BKD: Tensor) -> Tensor:
        return torch.stack(terms(Decoder(passes, memory_BKD), True)).sum()

    found = terms(passes, False)
    if "decoder" in stage.needs:
        # The decoder reads a prefix as it would the states of an encoder with so few memory tokens:
        # they follow BOS at once, the places of those left out are not kept free.
        parts = [prefix_of(passes.memory_BKD, j, compressor.order) for j in compressor.prefixes]
        found.append(torch.stack([two_step(part, decoded) for part in parts]).mean())
    return torch.stack(found).sum()


def two_step(memory_BKD: Tensor, loss_from: Callable[[Tensor], Tensor]) -> Tensor:
    """Value of the loss, gradient through the memory states alone (steps 2 to 4 above)."""
    if not torch.is_grad_enabled():
        return loss_from(memory_BKD)
    leaf = memory_BKD.detach().requires_grad_()
    loss = loss_from(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    carried = (memory_BKD * gradient).sum(dtype=loss.dtype)
    return loss.detach() + carried - carried.detach()


@torch.no_grad()
def teacher_states(backbone: Backbone, batch: SplitTexts, skipped: int = 0) -> Tensor:
    """States of the frozen LM on the full texts, teacher_ND.

    They begin at the context's last token, or `skipped` tokens later.
    """
    places_BT = torch.arange(batch.text.ids_BT.shape[1], device=batch.text.ids_BT.device)[None]
    first_B1 = batch.context.lengths_B[:, None] - 1 + skipped
    needed_BT = (places_BT >= first_B1) & batch.text.mask_BT.bool()
    x_BTD = backbone.embed(batch.text.ids_BT)
    return backbone.decoder_pass(x_BTD, batch.text.mask_BT, needed_BT)[needed_BT]


def decode_from_memory(
    compressor: Compressor, memory_BKD: Tensor, text: Tokens
) -> tuple[Tensor, Tensor]:
    """The frozen decoder on BOS (if any), memory and a right-padded text.

    Returns:
        states_BCD from the last memory token on (C + 1 places: place 0 predicts the text's first
        token), and their mask valid_BC, bool.
    """
    backbone = compressor.backbone
    texts_BTD = backbone.embed(text.ids_BT)
    # a trained copy is float32, and so are its states, over a decoder that need not be
    x = torch.cat([memory_BKD.to(texts_BTD.dtype), texts_BTD], 1)
    mask = torch.cat([text.mask_BT.new_ones(memory_BKD.shape[:2]), text.mask_BT], 1)
    if backbone.bos_id is not None:
        bos_B1 = text.ids_BT.new_full((len(x), 1), backbone.bos_id)
        x = torch.cat([backbone.embed(bos_B1), x], 1)
        mask = torch.cat([mask.new_ones(len(x), 1), mask], 1)
    start = x.shape[1] - text.ids_BT.shape[1] - 1
    return backbone.decoder_pass(x, mask)[:, start:], mask[:, start:].bool()

"""The two means of stage 1: over a text's positions and then over texts, or over all positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["sample_mean", "token_mean"]


def text_weights(positions_B: Tensor, weighting: Weighting, items: float) -> Tensor:
    """Weight of each of a text's positions so that the weighted sum is the mean asked for: weights_B, float32.

    A text without positions adds nothing, though `sample_mean` counts it in `items`.
    """
    positions = positions_B.clamp_min(1).float()
    return (positions.reciprocal() if weighting == "sample_mean" else torch.ones_like(positions)) / items


def position_weights(positions_B: Tensor, weighting: Weighting, items: float) -> Tensor:
    """`text_weights` for each gathered position: weights_N."""
    return text_weights(positions_B, weighting, items).repeat_interleave(positions_B)

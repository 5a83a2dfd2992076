"""Token ids with their mask, and the split of a text into context and continuation. No model here.

Shapes in tensor names, one legend for the package:
B texts · T text tokens · K memory tokens · S = T + K · C continuation tokens · D hidden width · V vocabulary ·
N gathered positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Tokens:
    """A padded batch. `ids_BT` int64; `mask_BT` int64, 1 = token, 0 = padding (its id never matters)."""

    ids_BT: Tensor
    mask_BT: Tensor

    def __post_init__(self) -> None:
        if self.ids_BT.ndim != 2 or self.ids_BT.shape != self.mask_BT.shape:
            raise ValueError(f"expected ids and mask of one shape (B, T), got {self.ids_BT.shape} and {self.mask_BT.shape}")

    @classmethod
    def pad(cls, rows: Sequence[Sequence[int]], side: Side, pad_id: int = 0) -> Tokens:
        """Rows of token ids as one rectangle, padded on `side`."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, place] = torch.tensor(row, dtype=torch.int64)
            mask[i, place] = 1
        return cls(ids, mask)

    def to(self, device: torch.device | str) -> Tokens:
        """The same batch on a device."""
        return Tokens(self.ids_BT.to(device), self.mask_BT.to(device))

    @property
    def lengths_B(self) -> Tensor:
        """Tokens per text, padding not counted."""
        return self.mask_BT.sum(1)


def longest_first(lengths: Sequence[int], at_once: Callable[[int], int]) -> Iterator[list[int]]:
    """Places of texts in groups of like length, the longest first: what will not fit shows at once, little is padding.

    `at_once` says, when a group is due, how many go into it, given the length of its longest; one at least.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        group = order[start : start + max(1, at_once(lengths[order[start]]))]
        yield group
        start += len(group)


def position_ids(mask_BT: Tensor) -> Tensor:
    """Position of every token within its own text, whatever the padding side; 0 at padding."""
    return (mask_BT.cumsum(1) - 1).clamp_min(0)


def split_site(length: int, margin: int, seed: int, row: int) -> int | None:
    """Length of the context: uniform in [margin, length − margin], fixed by (seed, row); None if the text is too short."""
    if length < 2 * margin:
        return None
    return random.Random(f"{seed}:{row}").randint(margin, length - margin)


@dataclass(frozen=True)
class SplitTexts:
    """A pretext batch: each text whole (right-padded) and as context (left-padded) + continuation (right-padded)."""

    text: Tokens
    context: Tokens
    continuation: Tokens

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], sites: Sequence[int], pad_id: int = 0) -> SplitTexts:
        """Split row i after its first `sites[i]` tokens.

        Raises:
            ValueError: a site leaves no context or no continuation.
        """
        for row, site in zip(rows, sites, strict=True):
            if not 0 < site < len(row):
                raise ValueError(f"expected a site within 1 and {len(row) - 1}, got {site}")
        return cls(
            text=Tokens.pad(rows, "right", pad_id),
            context=Tokens.pad([row[:site] for row, site in zip(rows, sites, strict=True)], "left", pad_id),
            continuation=Tokens.pad([row[site:] for row, site in zip(rows, sites, strict=True)], "right", pad_id),
        )

    def to(self, device: torch.device | str) -> SplitTexts:
        """The same batch on a device."""
        return SplitTexts(self.text.to(device), self.context.to(device), self.continuation.to(device))

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat form, as trainers move it between devices."""
        parts = {"text": self.text, "context": self.context, "continuation": self.continuation}
        return {
            f"{name}_{kind}": tensor for name, t in parts.items() for kind, tensor in (("ids", t.ids_BT), ("mask", t.mask_BT))
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> SplitTexts:
        """Inverse of `to_tensors`."""
        return cls(**{n: Tokens(tensors[f"{n}_ids"], tensors[f"{n}_mask"]) for n in ("text", "context", "continuation")})

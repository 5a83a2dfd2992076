"""Token ids with their mask, and the split of a text into context and continuation. No model here.

Shapes in tensor names, one legend for the package: B texts · T text tokens · K memory tokens · S =
T + K · C continuation tokens · D hidden width · V vocabulary · N gathered positions.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm2comp.errors import BackboneError

Side = Literal["left", "right"]
NOT_MASKED = -1


@dataclass(frozen=True)
class Tokens:
    """A padded batch.

    `ids_BT` int64; `mask_BT` int64, 1 = token, 0 = padding (its id never matters).
    """

    ids_BT: Tensor
    mask_BT: Tensor

    def __post_init__(self) -> None:
        if self.ids_BT.ndim != 2 or self.ids_BT.shape != self.mask_BT.shape:
            raise ValueError(
                f"expected ids and mask of one shape (B, T), got {self.ids_BT.shape} and "
                f"{self.mask_BT.shape}"
            )

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


def limit_of(value: object, least: int) -> int:
    """A value of `max_seq_length`.

    Raises BackboneError unless a whole number that leaves room for a text.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        expected = (
            f"{least} or more: what stands around a text (memory, prompt, BOS) takes {least - 1}"
        )
        raise BackboneError(
            "leaves no room for a text", where="max_seq_length", expected=expected, found=value
        )
    return value


def wrap(tokens: Tokens, before: Sequence[int], behind: Sequence[int], start: int) -> Tokens:
    """Left-padded texts with ids put behind their first `start` tokens (BOS) and at their ends."""
    if not before and not behind:
        return tokens
    ids_BT, mask_BT = tokens.ids_BT, tokens.mask_BT
    if before:
        rows, width = ids_BT.shape
        first_B1 = width - tokens.lengths_B[:, None] + start  # where the text begins
        places_BT = torch.arange(width + len(before), device=ids_BT.device).expand(rows, -1)
        inside_BT = (places_BT >= first_B1) & (places_BT < first_B1 + len(before))
        source_BT = torch.where(places_BT < first_B1, places_BT, places_BT - len(before)).clamp(
            0, width - 1
        )
        put_BT = ids_BT.new_tensor(before)[(places_BT - first_B1).clamp(0, len(before) - 1)]
        ids_BT = torch.where(inside_BT, put_BT, ids_BT.gather(1, source_BT))
        mask_BT = mask_BT.gather(1, source_BT).masked_fill(inside_BT, 1)
    rows = len(ids_BT)
    ends_BT = ids_BT.new_tensor(list(behind), dtype=torch.int64).expand(rows, -1)
    return Tokens(
        torch.cat([ids_BT, ends_BT], 1), torch.cat([mask_BT, torch.ones_like(ends_BT)], 1)
    )


def longest_first(lengths: Sequence[int], at_once: Callable[[int], int]) -> Iterator[list[int]]:
    """Places of texts in groups of like length, the longest first.

    So what will not fit shows at once, and little is padding.

    `at_once` says, when a group is due, how many go into it, given the length of its longest; one
    at least.
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
    """Length of the context: uniform in [margin, length − margin], fixed by (seed, row).

    None if the text is too short.
    """
    if length < 2 * margin:
        return None
    return random.Random(f"{seed}:{row}").randint(margin, length - margin)


@dataclass(frozen=True)
class SplitTexts:
    """A batch of stage 1: each text whole, and as context and continuation.

    Contexts are padded on the left, the others on the right.

    `replaced_BT`, beside the whole texts: the id that stands in for a masked token, `NOT_MASKED`
    elsewhere; None: no masks. `teacher_BD`: a teacher's embedding of each response, of any width.
    """

    text: Tokens
    context: Tokens
    continuation: Tokens
    replaced_BT: Tensor | None = None
    teacher_BD: Tensor | None = None

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[Sequence[int]],
        sites: Sequence[int],
        pad_id: int = 0,
        replaced: Sequence[Sequence[int]] | None = None,
        teacher_BD: Tensor | None = None,
    ) -> SplitTexts:
        """Split row i after its first `sites[i]` tokens; `replaced[i]` is as long as the row.

        Raises:
            ValueError: a site leaves no context or no continuation.
        """
        for row, site in zip(rows, sites, strict=True):
            if not 0 < site < len(row):
                raise ValueError(f"expected a site within 1 and {len(row) - 1}, got {site}")
        contexts = [row[:site] for row, site in zip(rows, sites, strict=True)]
        continuations = [row[site:] for row, site in zip(rows, sites, strict=True)]
        masks = None if replaced is None else Tokens.pad(replaced, "right", NOT_MASKED)
        return cls(
            text=Tokens.pad(rows, "right", pad_id),
            context=Tokens.pad(contexts, "left", pad_id),
            continuation=Tokens.pad(continuations, "right", pad_id),
            replaced_BT=None if masks is None else masks.ids_BT,
            teacher_BD=teacher_BD,
        )

    def to(self, device: torch.device | str) -> SplitTexts:
        """The same batch on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.to_tensors().items()}
        return SplitTexts.from_tensors(moved)

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat form, as trainers move it between devices."""
        flat: dict[str, Tensor | None] = {"replaced": self.replaced_BT, "teacher": self.teacher_BD}
        for name in ("text", "context", "continuation"):
            tokens: Tokens = getattr(self, name)
            flat |= {f"{name}_ids": tokens.ids_BT, f"{name}_mask": tokens.mask_BT}
        return {name: tensor for name, tensor in flat.items() if tensor is not None}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> SplitTexts:
        """Inverse of `to_tensors`."""
        text, context, continuation = (
            Tokens(tensors[f"{name}_ids"], tensors[f"{name}_mask"])
            for name in ("text", "context", "continuation")
        )
        return cls(text, context, continuation, tensors.get("replaced"), tensors.get("teacher"))


def room_for_text(positions: int | None, memory: int, asked: int) -> int:
    """Tokens of the longest text that fits with `memory` tokens into `positions` (None: no limit):
    `asked` or less.

    Raises:
        BackboneError: the memory leaves no room for BOS and a token.
    """
    room = asked if positions is None else min(asked, positions - memory)
    if room < 2:
        raise BackboneError(
            "no room for a text beside the memory",
            where="memory.tokens",
            expected=f"{positions} positions of the model, less 2 or more for a text",
            found=memory,
        )
    return room

"""Rows of stage 1: texts as token ids in a fixed order, each split at a fixed site.

They are the same for any number of workers.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llm2comp.errors import DataError
from llm2comp.model.tokens import NOT_MASKED, SplitTexts, split_site
from llm2comp.recipe import PretextStage

TOKENISE_AT_ONCE = 1000
WINDOW_BATCHES = 16


Item = TypeVar("Item")
Kept = TypeVar("Kept", bound=Sequence[NDArray[np.int32]])


def token_rows(
    texts: Iterable[str],
    stage: PretextStage,
    tokenise: Callable[[Sequence[str]], list[list[int]]],
    max_tokens: int,
    bos_id: int | None,
    keep: Callable[[Iterable[NDArray[np.int32]]], Kept] = list,  # type: ignore[assignment]
) -> tuple[Kept, Counter[str]]:
    """Texts as token ids that can be split, and the texts left out by reason.

    Args:
        texts: the stage's texts.
        stage: its limits (`min_characters`, `long_texts`, `site_margin_tokens`).
        tokenise: `Backbone.tokenise`.
        max_tokens: longest row, BOS included.
        bos_id: what every row starts with, later pieces of a chunked text too.
        keep: draws the rows one by one and holds them, in memory or on disk.

    Raises:
        DataError: no text is left.
    """
    left_out: Counter[str] = Counter()
    rows = keep(_fit_rows(texts, stage, tokenise, max_tokens, bos_id, left_out))
    if not len(rows):
        expected = (
            f"{stage.min_characters} characters or more, {2 * stage.site_margin_tokens} to "
            f"{max_tokens} tokens"
        )
        raise no_text_is_fit(
            left_out,
            expected,
            "set pretext.min_characters, max_tokens or long_texts (truncate, chunk)",
        )
    return rows, +left_out


def _fit_rows(
    texts: Iterable[str],
    stage: PretextStage,
    tokenise: Callable[[Sequence[str]], list[list[int]]],
    max_tokens: int,
    bos_id: int | None,
    left_out: Counter[str],
) -> Iterator[NDArray[np.int32]]:
    for batch in long_enough(texts, len, stage.min_characters, left_out):
        for ids in tokenise(batch):
            if len(ids) > max_tokens and stage.long_texts == "skip":
                left_out[f"over {max_tokens} tokens"] += 1
                continue
            for piece in _pieces(ids, max_tokens, stage.long_texts == "chunk", bos_id):
                if len(piece) < 2 * stage.site_margin_tokens:
                    left_out[f"under {2 * stage.site_margin_tokens} tokens"] += 1
                else:
                    yield np.asarray(piece, dtype=np.int32)


def long_enough(
    items: Iterable[Item], characters: Callable[[Item], int], least: int, left_out: Counter[str]
) -> Iterator[list[Item]]:
    """Yield batches of items with enough characters; count the others."""
    rest = iter(items)
    while some := list(itertools.islice(rest, TOKENISE_AT_ONCE)):
        kept = [item for item in some if characters(item) >= least]
        left_out[f"under {least} characters"] += len(some) - len(kept)
        if kept:
            yield kept


def no_text_is_fit(left_out: Counter[str], expected: str, fix: str) -> DataError:
    """The error for a stage without usable texts."""
    found = ", ".join(f"{count:,} {reason}" for reason, count in (+left_out).items())
    return DataError(
        "no text is fit for stage 1", where="pretext.data", expected=expected, found=found, fix=fix
    )


def _pieces(
    ids: list[int], max_tokens: int, chunk: bool, bos_id: int | None
) -> Iterable[list[int]]:
    if len(ids) <= max_tokens or not chunk:
        return [ids[:max_tokens]]
    start = [] if bos_id is None else [bos_id]
    rest, room = ids[len(start) :], max_tokens - len(start)
    return [start + rest[i : i + room] for i in range(0, len(rest), room)]


@dataclass(frozen=True)
class Masking:
    """Which tokens are masked and what replaces them; fixed by (seed, sample number).

    The first token is never masked: it is BOS, or has no state before it. Of the others the share
    `rate` is masked, at least one. A masked token becomes `mask_id`. With `bert`: `mask_id` in 80 %
    of cases, a random id in 10 %, unchanged in 10 %.
    """

    rate: float
    mask_id: int
    vocabulary: int
    bert: bool
    seed: int

    def __call__(self, ids: Sequence[int], sample: int) -> list[int]:
        """The replacement id at each masked position, `NOT_MASKED` at the others."""
        draw = random.Random(f"mask:{self.seed}:{sample}")
        replaced = [NOT_MASKED] * len(ids)
        for place in draw.sample(range(1, len(ids)), max(1, round(self.rate * (len(ids) - 1)))):
            fate = draw.random() if self.bert else 0.0
            replaced[place] = (
                self.mask_id
                if fate < 0.8
                else draw.randrange(self.vocabulary)
                if fate < 0.9
                else ids[place]
            )
        return replaced


class PretextRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Sample i of a run: a text of this epoch's shuffle, split at a site fixed by (seed, i).

    Args:
        rows: texts as token ids.
        samples: how many the run draws.
        margin: least tokens on both sides of a site.
        seed: of the shuffles and the sites.
        batch_size: > 1 lets samples that fall into one batch be of like length, which saves
            padding: each window of 16 shuffled batches is sorted by length, its batches shuffled.
            Texts that fill no batch wait for the next epoch.
        masking: masks for each sample; None: none.
    """

    def __init__(
        self,
        rows: Sequence[np.ndarray],
        samples: int,
        margin: int,
        seed: int,
        batch_size: int = 1,
        masking: Masking | None = None,
    ) -> None:
        self.rows, self.samples, self.margin, self.seed, self.masking = (
            rows,
            samples,
            margin,
            seed,
            masking,
        )
        self.batch_size = batch_size if batch_size <= len(rows) else 1
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> dict[str, Any]:
        ids = self.rows[self.row_of(i)].tolist()
        sample = {"ids": ids, "site": split_site(len(ids), self.margin, self.seed, i)}
        return sample if self.masking is None else sample | {"replaced": self.masking(ids, i)}

    def row_of(self, i: int) -> int:
        """Which row sample i is of."""
        epoch, place = divmod(i, len(self.rows) - len(self.rows) % self.batch_size)
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffle(epoch))
        return int(self._order[1][place])

    def _shuffle(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.rows))
        if self.batch_size == 1:
            return order
        order = order[: len(order) - len(order) % self.batch_size]
        # of a store, which would read them all from disk
        kept: np.ndarray | None = getattr(self.rows, "lengths", None)
        lengths = kept[order] if kept is not None else np.array([len(self.rows[i]) for i in order])
        window = self.batch_size * WINDOW_BATCHES
        parts = range(0, len(order), window)
        order = np.concatenate(
            [
                order[s : s + window][np.argsort(lengths[s : s + window], kind="stable")]
                for s in parts
            ]
        )
        return rng.permutation(order.reshape(-1, self.batch_size)).ravel()


class PretextCollator:
    """Samples → the flat tensors of a `SplitTexts`."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and split."""
        rows, sites = [sample["ids"] for sample in samples], [sample["site"] for sample in samples]
        replaced, teacher = (
            [sample[name] for sample in samples] if name in samples[0] else None
            for name in ("replaced", "teacher")
        )
        teacher_BD = None if teacher is None else torch.from_numpy(np.stack(teacher))
        return SplitTexts.from_rows(rows, sites, self.pad_id, replaced, teacher_BD).to_tensors()

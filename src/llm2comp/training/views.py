"""Two views of a text for stage 2: two random spans of its words (arXiv 2508.03453).

Dropout acts on them as the recipe sets it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from random import Random
from typing import Any

from sentence_transformers.sentence_transformer import data_collator

Shares = tuple[float, float]

# A run without white space is cut after 20 characters: some scripts put none between words.
_WORD = re.compile(r"\S{1,20}")


def crop(text: str, share: Shares, draw: Random) -> str:
    """A contiguous part of a text: of its n words round(s · n), one at least, begun anywhere.

    s is uniform in `share`. A text without a word stays as it is.
    """
    spans = [word.span() for word in _WORD.finditer(text)]
    if not spans:
        return text
    count = max(1, round(draw.uniform(*share) * len(spans)))
    first = draw.randint(0, len(spans) - count)
    return text[spans[first][0] : spans[first + count - 1][1]]


def two_crops(text: str, share: Shares, seed: int, epoch: int) -> tuple[str, str]:
    """The two views of a text in one epoch.

    They depend on nothing else, neither on the batch nor on what was drawn before. So a resumed
    run draws them again, and of several processes it does not matter which has the text.
    """
    draw = Random(f"{seed}:{epoch}:{text}")
    return crop(text, share, draw), crop(text, share, draw)


@dataclass
class CropCollator(data_collator.SentenceTransformerDataCollator):
    """The stock collator over `two_crops` of each row's text.

    The sampler before it still compares whole texts when it keeps duplicates out of a batch.
    """

    seed: int = 0
    share: Shares = (0.3, 0.7)
    # It knows the epoch, after a resume too, as its order of rows goes by it.
    sampler: Any = field(default=None, repr=False)

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows, `anchor` and `positive` of which are one text, as ids and masks of both views."""
        epoch: int = self.sampler.epoch
        views = [two_crops(row["anchor"], self.share, self.seed, epoch) for row in features]
        rows = [{"anchor": first, "positive": second} for first, second in views]
        batch: dict[str, Any] = super().__call__(rows)
        return batch

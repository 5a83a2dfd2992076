"""Rows of stage 1 for texts with responses: the text is the context, its response continues it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2comp.data.loaded import Response
from llm2comp.data.pretext import Masking, PretextRows, long_enough, no_text_is_fit
from llm2comp.recipe import PretextStage


@dataclass(frozen=True)
class ResponseRow:
    """Token ids of a text and its response, the text's length, and a teacher's embedding."""

    ids: NDArray[np.int32]
    site: int
    teacher_D: NDArray[np.float32] | None = None


def response_rows(
    given: Sequence[Response],
    stage: PretextStage,
    tokenise: Callable[[Sequence[str]], list[list[int]]],
    max_tokens: int,
    bos_id: int | None,
) -> tuple[list[ResponseRow], Counter[str]]:
    """Texts and responses as token ids, and those left out by reason.

    Arguments as for `token_rows`.

    `max_tokens` is for both together. Under `long_texts: truncate` the response loses its end
    first, down to half of them, then the text.

    Raises:
        DataError: nothing is left.
    """
    rows: list[ResponseRow] = []
    left_out: Counter[str] = Counter()
    bos = int(bos_id is not None)
    for batch in long_enough(given, lambda one: len(one.text), stage.min_characters, left_out):
        texts, responses = (
            tokenise([one.text for one in batch]),
            tokenise([one.response for one in batch]),
        )
        for one, text, response in zip(batch, texts, responses, strict=True):
            said = response[bos:]
            if len(text) <= bos or not said:
                left_out["without tokens"] += 1
            elif len(text) + len(said) > max_tokens and stage.long_texts == "skip":
                left_out[f"over {max_tokens} tokens with their response"] += 1
            else:
                said = said[: max(max_tokens - len(text), max_tokens // 2)]
                context = text[: max_tokens - len(said)]
                rows.append(
                    ResponseRow(
                        np.asarray(context + said, dtype=np.int32), len(context), one.teacher_D
                    )
                )
    if not rows:
        expected = (
            f"{stage.min_characters} characters or more, {max_tokens} tokens or fewer with "
            "the response"
        )
        raise no_text_is_fit(
            left_out, expected, "set pretext.min_characters, max_tokens or long_texts: truncate"
        )
    return rows, +left_out


class ResponseRows(PretextRows):
    """As `PretextRows`, each row split where its response begins, with its teacher's embedding."""

    def __init__(
        self,
        rows: Sequence[ResponseRow],
        samples: int,
        seed: int,
        batch_size: int = 1,
        masking: Masking | None = None,
    ) -> None:
        super().__init__([row.ids for row in rows], samples, 1, seed, batch_size, masking)
        self.given = rows

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self.given[self.row_of(i)]
        sample = super().__getitem__(i) | {"site": row.site}
        return sample if row.teacher_D is None else sample | {"teacher": row.teacher_D}

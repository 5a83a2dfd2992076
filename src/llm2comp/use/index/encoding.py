"""The encoder of an index: its vectors, its tokens, its identity. Imports torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llm2comp.data.documents import SIZE
from llm2comp.errors import DataError
from llm2comp.model.encoder import refuse_not_finite
from llm2comp.model.inputs import frame_of, prompt_of, tokenise
from llm2comp.model.vectors import embed_texts, unit_length
from llm2comp.storage.identity import identity
from llm2comp.storage.loading import load
from llm2comp.system.console import Bar, Role
from llm2comp.use.embed import room_of
from llm2comp.use.index.info import Info


class Encoder:
    """An encoder that `llm2comp.load` knows, for passages and questions."""

    def __init__(
        self, name: str, device: str | None = None, model: SentenceTransformer | None = None
    ) -> None:
        self.name = name
        self.model = model or load(name, device, merged=True)
        self.identity = identity(name, self.model)

    @property
    def dimensions(self) -> int:
        """D of its vectors."""
        return int(self.model.get_embedding_dimension() or 0)

    @functools.cached_property
    def room(self) -> int:
        """Most tokens of a passage and its headings, behind the prompt of documents.

        Raises DataError: none.
        """
        prompt = prompt_of(self.model, "document")
        room = room_of(self.model, frame_of(self.model, "document"), prompt)
        return room - len(tokenise(self.model, [prompt])[0])

    def described(self, passage_tokens: int | None, overlap: int) -> Info:
        """What an index of it is; None: passages of the usual size, or as long as it reads.

        Raises DataError where it reads less than a passage.
        """
        if passage_tokens is None:
            passage_tokens = min(SIZE, self.room)
        if self.room < passage_tokens:
            raise DataError(
                "passages are longer than the model reads",
                where="passage tokens",
                expected=f"{self.room:,} or fewer",
                found=passage_tokens,
                fix="index into a new folder, without --passage-tokens or with fewer",
            )
        who = self.identity
        return Info(self.name, who.name, who.revision, self.dimensions, passage_tokens, overlap)

    def vectors(
        self, texts: Sequence[str], role: Role, bar: Bar | None = None
    ) -> NDArray[np.float32]:
        """Vectors of length 1, (N, D). Raises DataError: one that is not finite."""
        found_ND = embed_texts(self.model, texts, role=role, bar=bar).numpy()
        refuse_not_finite(found_ND, texts)
        return unit_length(found_ND)

    def offsets(self, text: str) -> Sequence[tuple[int, int]]:
        """Where the tokens of a text begin and end."""
        found: Sequence[tuple[int, int]] = self.model.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=False, verbose=False
        )["offset_mapping"]
        return found

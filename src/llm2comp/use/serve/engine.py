"""One model as the server uses it: texts → token ids → vectors, and memory states.

Texts are tokenised where requests arrive, each once; the model's thread is given ids.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from llm2comp.errors import ModelFolderError
from llm2comp.model.compressor import Compressor
from llm2comp.model.encoder import NO_LIMIT, MemoryEncoder, check_prompt
from llm2comp.model.inputs import Frame, Ids, Inputs, frame_of, prompt_of, tokenise
from llm2comp.model.tokens import Tokens
from llm2comp.recipe import BUILTIN_ENCODERS
from llm2comp.storage.compiled import compiled_of
from llm2comp.storage.identity import identity
from llm2comp.storage.weights import memory_ids

ROLES = ("query", "document")


@dataclass(frozen=True, eq=False)
class Text:
    """One text as the model will read it.

    Args:
        length: positions that it takes in the model, a guess where it is without ids.
        tokens: of the text and its prompt, as read; BOS, memory and templates are not counted.
        cut: it was longer than the model reads; None: not known, as `tokens` is a guess.
        ids: token ids, cut to the limit; None: the model reads `text` for itself.
        prompt, role: what stands before `text`, and whose it is; of texts without ids.
    """

    length: int
    tokens: int
    cut: bool | None = False
    ids: Ids | None = None
    text: str = ""
    prompt: str = ""
    role: str | None = None

    @property
    def reading(self) -> tuple[bool, str, str | None]:
        """Texts of one reading can be computed in one batch."""
        return self.ids is None, self.prompt, self.role


class Engine:
    """A model, what it is called, and how it reads.

    Args:
        model: any sentence-transformers model.
        path: what it was loaded from.
        name: what callers call it; None: that of a packaged encoder, or its name in results.
    """

    def __init__(self, model: SentenceTransformer, path: str, name: str | None = None) -> None:
        self.model, who = model.eval(), identity(path, model)
        known = path if path in BUILTIN_ENCODERS else who.name
        self.name, self.revision = name or known, who.revision
        self.width = model.truncate_dim or model.get_embedding_dimension() or 0
        self.prompts = {name: text for name, text in model.prompts.items() if text}
        frames = {role: frame_of(model, role) for role in (None, *ROLES)}
        self.frames: dict[str | None, Frame] = {r: f for r, f in frames.items() if f is not None}
        # Of a model that tokenises for itself: it does so in another thread, with settings of its
        # own, and a tokenizer holds one set of them.
        own = None if self.frames else getattr(model, "tokenizer", None)
        self._counter = copy.deepcopy(own) if callable(own) else None
        for role in (*ROLES, None):
            check_prompt(model, prompt_of(model, role), role)
        self.states = self._count_states()
        graph = compiled_of(model)
        self.backend = graph.backend if graph else "torch"
        weights = next(model.parameters(), torch.empty(0))
        self.precision = graph.precision if graph else str(weights.dtype).removeprefix("torch.")

    @property
    def compressor(self) -> Compressor:
        """The encoder proper, over its frozen LM. Raises ModelFolderError: there is none."""
        if not isinstance(module := self.model[0], MemoryEncoder):
            expected = "a run, a stage of a run, or builtin:general"
            raise ModelFolderError("has no frozen LM", where=self.name, expected=expected)
        return module.compressor

    @functools.cached_property
    def limit(self) -> int:
        """Tokens of the longest text that is read whole, its prompt included."""
        if self.frames:
            return self.frames[None].room
        around = len(self._counter("", verbose=False)["input_ids"]) if self._counter else 0
        return int(min(self.model.max_seq_length or NO_LIMIT, NO_LIMIT)) - around

    def limit_of(self, role: str | None) -> int:
        """The same of texts of a role."""
        return self.frames[role].room if role in self.frames else self.limit

    def prompt(self, role: str | None, name: str | None = None) -> str:
        """What stands before texts of a role, or the prompt of a name. Raises KeyError: none."""
        return prompt_of(self.model, role) if name is None else self.model.prompts[name] or ""

    def read(self, texts: Sequence[str], role: str | None, prompt: str) -> list[Text]:
        """Texts after a prompt, as the model will read them; may run in any thread."""
        frame = self.frames.get(role)
        if frame is None:
            limit, known = self.limit, self._counter is not None or self.limit == NO_LIMIT
            return [
                Text(
                    1 + min(count, limit),
                    min(count, limit),
                    count > limit if known else None,
                    text=text,
                    prompt=prompt,
                    role=role,
                )
                for text, count in zip(texts, self._counts(texts, prompt), strict=True)
            ]
        rows = tokenise(self.model, [prompt + text for text in texts])
        return [
            Text(len(row) + frame.added, len(row), len(row) < len(whole), row)
            for whole, row in ((whole, whole[: frame.room]) for whole in rows)
        ]

    def _counts(self, texts: Sequence[str], prompt: str) -> list[int]:
        """Tokens of texts that are read without a frame; a guess where there is no tokenizer."""
        whole = [prompt + text for text in texts]
        if self._counter is None:
            return Inputs(self.model, whole).lengths
        rows = self._counter(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return [len(row) for row in rows]

    def decode(self, ids: Sequence[int]) -> str | None:
        """The text that exactly these token ids are of, BOS before it or not; None: there is
        none.
        """
        tokenizer, frame = self.model.tokenizer, self.frames.get(None)
        head = frame.head if frame else ()
        own = list(ids[len(head) :] if head and tuple(ids[: len(head)]) == head else ids)
        if not own or not 0 <= min(own) <= max(own) < len(tokenizer):
            return None
        text: str = tokenizer.decode(own, clean_up_tokenization_spaces=False)
        return text if tokenise(self.model, [text])[0].tolist() == own else None

    @torch.inference_mode()
    def compute(self, texts: Sequence[Text]) -> Tensor:
        """Vectors of texts of one reading, (B, 1 + K, D): the embedding, then its memory states
        where the model has them (`states`).
        """
        model, first = self.model, texts[0]
        if first.ids is None:
            plain = [text.text for text in texts]
            inputs = Inputs(model, plain, None, None, first.prompt, first.role)
            features, task = inputs.features(range(len(plain))), inputs.task
        else:
            frame = replace(next(iter(self.frames.values())), room=NO_LIMIT)  # ids are cut already
            rows = [text.ids for text in texts if text.ids is not None]
            features, task = frame.features(rows, model.device), {}
        if not self.states:
            found_BD: Tensor = model(features, **task)["sentence_embedding"]
            return found_BD[:, None, : model.truncate_dim]
        if isinstance(module := model[0], MemoryEncoder):
            tokens = Tokens(features["input_ids"], features["attention_mask"])
            states_BKD = module.compressor.memory_states(tokens).float()
            embedding_BD = module.compressor.pool(states_BKD)
        else:
            mask_BT = features["attention_mask"]
            features = module(features)
            left = mask_BT.shape[1] - mask_BT.sum(1) if frame.side == "left" else 0
            last_BK = (mask_BT.sum(1) + left)[:, None] + torch.arange(-self.states, 0).to(mask_BT)
            rows_B1 = torch.arange(len(texts), device=mask_BT.device)[:, None]
            states_BKD = features["token_embeddings"][rows_B1, last_BK].float()
            for part in list(model)[1:]:  # in place: weights would be in the states
                features = part(features)
            embedding_BD = features["sentence_embedding"].float()
        return torch.cat([embedding_BD[:, None], states_BKD], 1)

    def _count_states(self) -> int:
        """K of a model whose embedding is a mean of memory states, else 0."""
        if isinstance(module := self.model[0], MemoryEncoder):
            whole = module.compressor.projection is None and not self.model.truncate_dim
            return module.compressor.states if whole and module.compressor.memory.count else 0
        whole = len(self.model) <= 3 and not self.model.truncate_dim
        return len(memory_ids(self.model)) if whole and self.frames else 0

"""Texts as a sentence-transformers model reads them, tokenised once where that can be."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import Tensor

from llm2comp.model.encoder import MemoryEncoder, check_prompt
from llm2comp.model.tokens import Side, Tokens

TOKENISE_AT_ONCE = 1000
# Characters that count as one token of a model whose tokens are not known.
CHARACTERS_PER_TOKEN = 4
Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Frame:
    """What a model reads around the tokens of a text: ids that are known need not be made again.

    Args:
        head, tail: ids before and after the text's own.
        room: most tokens of a text between them; the others are cut off.
        added: positions that a text takes in the model beside its own tokens.
        side, pad_id: how texts are padded.
    """

    head: tuple[int, ...]
    tail: tuple[int, ...]
    room: int
    added: int
    side: Side
    pad_id: int

    def features(self, rows: Sequence[Ids], device: torch.device | str) -> dict[str, Tensor]:
        """A batch of texts' ids as the model's input. On CUDA the copy runs beside the device."""
        framed = [[*self.head, *row[: self.room], *self.tail] for row in rows]
        tokens = Tokens.pad(framed, self.side, self.pad_id)
        features = {"input_ids": tokens.ids_BT, "attention_mask": tokens.mask_BT}
        if torch.device(device).type != "cuda":
            return {name: tensor.to(device) for name, tensor in features.items()}
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in features.items()}


def frame_of(model: SentenceTransformer, role: str | None = None) -> Frame | None:
    """The frame of a memory encoder, under the limit of a role, or of a stock transformer.

    None for other models, and for a transformer whose own inputs of trial texts differ from those
    of its frame.
    """
    module = model[0]
    if isinstance(module, MemoryEncoder):
        backbone = module.compressor.backbone
        head = () if backbone.bos_id is None else (backbone.bos_id,)
        added = len(head) + module.compressor.added
        return Frame(head, (), module.limit(role) - len(head), added, "left", backbone.pad_id)
    if not isinstance(module, Transformer) or not (tokenizer := model.tokenizer).is_fast:
        return None
    if any(getattr(part, "include_prompt", True) is False for part in model):
        return None  # its pooling must know where the prompt ends
    bare = tokenizer("", verbose=False)["input_ids"]
    found = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, mask = found["input_ids"], found["special_tokens_mask"]
    if not model.max_seq_length or 0 not in mask:
        return None
    start, room = mask.index(0), model.max_seq_length - len(bare)
    tail = tuple(ids[len(ids) - (len(bare) - start) :])
    pad_id = tokenizer.pad_token_id or 0
    frame = Frame(tuple(ids[:start]), tail, room, len(bare), tokenizer.padding_side, pad_id)
    trial = ["", "a", "some words of text", "a " * (room + 1)]
    ours, own = frame.features(tokenise(model, trial), "cpu"), model.preprocess(trial)
    tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
    same = tensors.keys() == ours.keys() and all(torch.equal(ours[k], tensors[k]) for k in ours)
    return frame if same else None


def tokenise(model: SentenceTransformer, texts: Sequence[str]) -> list[Ids]:
    """Token ids of each text, uncut, without what the model itself adds (BOS, memory)."""
    ids: list[Ids] = []
    for start in range(0, len(texts), TOKENISE_AT_ONCE):
        batch = list(texts[start : start + TOKENISE_AT_ONCE])
        found = model.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        ids += [np.asarray(row, dtype=np.int32) for row in found]
    return ids


@dataclass(frozen=True)
class Inputs:
    """Texts as one model reads them: how long each is, and any of them as a batch.

    Args:
        model: any sentence-transformers model.
        texts: the texts, without their prompt.
        frame: what stands around ids; None: the model reads every batch of texts for itself.
        ids: token ids of each text after its prompt; None: unknown.
        prompt: what stands before each text, read by a model without a frame.
        role: `query`, `document` or None, for models that read them differently.
    """

    model: SentenceTransformer
    texts: Sequence[str]
    frame: Frame | None = None
    ids: Sequence[Ids] | None = None
    prompt: str | None = None
    role: str | None = None

    @classmethod
    def of(
        cls,
        model: SentenceTransformer,
        texts: Sequence[str],
        prompt: str | None = None,
        role: str | None = None,
    ) -> Inputs:
        """Texts after a prompt; None: the model's own for the role.

        Raises:
            RecipeError: the prompt leaves a text no room.
        """
        prompt = prompt_of(model, role) if prompt is None else prompt
        if isinstance(model[0], MemoryEncoder):
            check_prompt(model, prompt, role)
        frame = frame_of(model, role)
        ids = tokenise(model, [prompt + text for text in texts]) if frame else None
        return cls(model, texts, frame, ids, prompt, role)

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each text and of what the model adds; a guess where its tokens are unknown."""
        if self.ids is None:
            return [1 + len(text) // CHARACTERS_PER_TOKEN for text in self.texts]
        if self.frame is None:
            return [len(row) for row in self.ids]
        return [min(len(row), self.frame.room) + self.frame.added for row in self.ids]

    def features(self, places: Sequence[int]) -> dict[str, Any]:
        """Some of the texts as the model's input, on its device."""
        device = self.model.device
        if self.frame is not None and self.ids is not None:
            return self.frame.features([self.ids[i] for i in places], device)
        texts: Any = [self.texts[i] for i in places]
        features = self.model.preprocess(texts, prompt=self.prompt, **self.task)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}

    @property
    def task(self) -> dict[str, str]:
        """The role, as sentence-transformers hands it from module to module."""
        return {"task": self.role} if self.role else {}


def prompt_of(model: SentenceTransformer, role: str | None) -> str:
    """What sentence-transformers puts before texts of a role, or of none; mostly nothing."""
    names = {"query": ("query",), "document": ("document", "passage", "corpus")}.get(role or "", ())
    name = next((n for n in names if n in model.prompts), model.default_prompt_name)
    return (model.prompts.get(name) or "") if name else ""

"""Any sentence-transformers model as mteb calls encoders: instructions, batches that fit, checked embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llm2comp.console import Bar, say
from llm2comp.encoder import refuse_not_finite
from llm2comp.errors import DataError
from llm2comp.tokens import longest_first

BLOCK_BATCHES = 16
DEFAULT_TEMPLATE = "{instruction}:"


class MtebEncoder(AbsEncoder):
    """A model with its own name and revision, so that its results are never mixed with another's.

    Args:
        model: the model.
        name: `organisation/model`; revision: what tells this checkpoint and its settings from all others.
        instructions: task name → instruction, put before queries and before texts of tasks without roles by `template`;
            other tasks get the model's stored prompts, by mteb's rules.
        template: holds `{instruction}`.
        batch_size: texts at once; None: 32 on a CPU, elsewhere 256, halved whenever the memory does not suffice.
        progress: draw a bar per call.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        name: str,
        revision: str,
        instructions: Mapping[str, str] | None = None,
        template: str = DEFAULT_TEMPLATE,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.model_prompts = {key: prompt for key, prompt in model.prompts.items() if prompt is not None}
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": revision})
        self.instructions, self.template, self.progress = dict(instructions or {}), template, progress
        self.batch_size = batch_size or (32 if model.device.type == "cpu" else 256)
        self.shrink = batch_size is None

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: PromptType | None = None, **_: Any
    ) -> NDArray[np.float32]:
        """Embeddings of a data loader's texts, in order: (N, D), float32.

        Raises:
            DataError: an embedding is not finite; names the text.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        out: NDArray[np.float32] | None = None
        with Bar(f"  {task_metadata.name}", len(texts), stays=False, shown=self.progress) as bar:
            for places in longest_first([len(text) for text in texts], lambda _: BLOCK_BATCHES * self.batch_size):
                block = self._encode([texts[i] for i in places], self._prompt(task_metadata, prompt_type), prompt_type)
                out = np.empty((len(texts), block.shape[1]), dtype=np.float32) if out is None else out
                out[places] = block
                bar.advance(len(places))
        if out is None:
            raise DataError("no text to embed", where=task_metadata.name)
        refuse_not_finite(out, texts, where=task_metadata.name)
        return out

    def _prompt(self, task: Any, prompt_type: PromptType | None) -> str | None:
        """The prompt for a text; None: the model's own rule."""
        if task.name in self.instructions:
            instruction = self.template.replace("{instruction}", self.instructions[task.name])
            return "" if prompt_type == PromptType.document else instruction
        name = self.get_prompt_name(task, prompt_type)
        return (self.model_prompts or {})[name] if name else None

    def _encode(self, texts: Sequence[str], prompt: str | None, prompt_type: PromptType | None) -> NDArray[np.float32]:
        by_role = {PromptType.query: self.model.encode_query, PromptType.document: self.model.encode_document}
        encode: Any = by_role[prompt_type] if prompt_type else self.model.encode
        while True:
            try:
                found = encode(list(texts), prompt=prompt, batch_size=self.batch_size, show_progress_bar=False)
                return np.asarray(found, dtype=np.float32)
            except torch.OutOfMemoryError:
                if not self.shrink or self.batch_size == 1:
                    raise
                self.batch_size //= 2
                torch.cuda.empty_cache()
                say(f"out of memory: going on with {self.batch_size} texts at once")

"""Any sentence-transformers model as mteb calls encoders: instructions, batches, checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from llm2comp.errors import DataError
from llm2comp.model.encoder import refuse_not_finite
from llm2comp.model.inputs import Inputs
from llm2comp.model.vectors import Budget, embeddings_of
from llm2comp.system.console import Bar

DEFAULT_TEMPLATE = "{instruction}:"


class MtebEncoder(AbsEncoder):
    """A model with its own name and revision, so that its results are never mixed with another's.

    Args:
        model: the model.
        name: `organisation/model`; revision: what tells this checkpoint and its settings from all
            others.
        instructions: task name → instruction, put before queries and before texts of tasks without
            roles by `template`; other tasks get the model's stored prompts, by mteb's rules.
        template: holds `{instruction}`.
        max_tokens_per_batch: tokens at once, padding included; None: what suits the device. Halved
            for all that follows when memory runs out.
        progress: draw a bar per call.
    """

    batch_size = 1024  # texts that mteb's loader hands over at once

    def __init__(
        self,
        model: SentenceTransformer,
        name: str,
        revision: str,
        instructions: Mapping[str, str] | None = None,
        template: str = DEFAULT_TEMPLATE,
        max_tokens_per_batch: int | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.model_prompts = {
            key: prompt for key, prompt in model.prompts.items() if prompt is not None
        }
        self.mteb_model_meta = ModelMeta.create_empty({"name": name, "revision": revision})
        self.instructions, self.template, self.progress = (
            dict(instructions or {}),
            template,
            progress,
        )
        self.budget = Budget.of(model.device, max_tokens_per_batch)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Embeddings of a data loader's texts, in order: (N, D), float32.

        Raises:
            DataError: an embedding is not finite; names the text.
        """
        texts = [text for batch in inputs for text in batch["text"]]
        if not texts:
            raise DataError("no text to embed", where=task_metadata.name)
        role = None if prompt_type is None else prompt_type.value
        read = Inputs.of(self.model, texts, self._prompt(task_metadata, prompt_type), role)
        name = f"  {task_metadata.name}"
        with Bar(name, len(texts), stays=False, shown=self.progress) as bar:
            out: NDArray[np.float32] = embeddings_of(read, self.budget, bar).numpy()
        refuse_not_finite(out, texts, where=task_metadata.name)
        return out

    def _prompt(self, task: Any, prompt_type: PromptType | None) -> str | None:
        """The prompt for a text; None: the model's own rule."""
        if task.name in self.instructions:
            instruction = self.template.replace("{instruction}", self.instructions[task.name])
            return "" if prompt_type == PromptType.document else instruction
        name = self.get_prompt_name(task, prompt_type)
        return (self.model_prompts or {})[name] if name else None

"""Training-free encoders: the untouched LM reads a text within a prompt.

Some of its states are the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from llm2comp.errors import BackboneError, ModelFolderError
from llm2comp.model.backbone import Backbone, hub_commit, load_backbone
from llm2comp.model.baselines.kinds import (
    BASELINE_FILE,
    BaselineSettings,
    SavedBaseline,
    SavedModel,
    read_saved,
    variant,
)
from llm2comp.model.baselines.prompts import TEXT, as_sentence, fill
from llm2comp.model.tokens import Tokens, limit_of
from llm2comp.system.files import write_text

# Where sentence-transformers keeps what was set on a saved model: its prompts, and these.
CONFIG_FILE = "config_sentence_transformers.json"
SET = {"default_prompt_name": str, "similarity_fn_name": str, "truncate_dim": int}


@dataclass(frozen=True)
class PromptRow:
    """One prompt as the LM reads it: token ids, BOS first, and 1 for each token that is pooled."""

    ids: list[int]
    span: list[int]


class BaselineEncoder(InputModule):
    """Causal LM, adapters off; padding and company change nothing.

    Args:
        backbone: the LM.
        settings: what is read and what is pooled, such as `settings.NAMES["echo"]`.

    Raises:
        BackboneError: no such layer; no room for a text within a prompt.
    """

    def __init__(self, backbone: Backbone, settings: BaselineSettings) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.backbone = backbone
        self.settings = settings
        self.tokenizer = backbone.tokenizer
        self.max_tokens = min(settings.max_tokens, backbone.max_positions or settings.max_tokens)
        layers = int(backbone.config.num_hidden_layers)
        if not -layers - 1 <= settings.layer <= layers:
            expected = f"0 (the embeddings) to {layers}, or -{layers + 1} to -1"
            raise BackboneError(
                "has no such layer", where=backbone.name, expected=expected, found=settings.layer
            )
        needed = {
            template: len(self._read(template, ["a"])[0].ids) for template in settings.templates
        }
        longest = max(needed, key=needed.__getitem__)
        if needed[longest] > self.max_tokens:
            raise BackboneError(
                f"too few positions for the prompt {longest[:60]!r} and a text",
                where=backbone.name,
                expected=f"{needed[longest]} or more",
                found=f"{self.max_tokens}: max_tokens is {settings.max_tokens}, the LM's limit "
                f"{backbone.max_positions}",
                fix="shorten the prompt, raise max_tokens, or choose another LM",
            )
        # Tokens of a text that fit into every prompt.
        self.limit: int | None = None  # a smaller number of them, if one was set
        self.room = min(
            1 + (self.max_tokens - count) // template.count(TEXT)
            for template, count in needed.items()
        )

    @property
    def max_seq_length(self) -> int:
        """Longest text, as the tokenizer counts it alone, without the prompt; may be set.

        None, or more than the LM takes, is the most that it takes. Raises BackboneError: no room
        for a text.
        """
        return (self.limit or self.room) + self._by_itself

    @max_seq_length.setter
    def max_seq_length(self, value: int | None) -> None:
        asked = None if value is None else limit_of(value, self._by_itself + 1) - self._by_itself
        self.limit = None if asked is None or asked >= self.room else asked

    @property
    def _by_itself(self) -> int:
        """Tokens that the tokenizer puts around a text."""
        return len(self.backbone.tokenizer("", verbose=False)["input_ids"])

    def get_embedding_dimension(self) -> int:
        """D."""
        return int(self.backbone.input_table.shape[1])

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Texts, each after `prompt`, as right-padded ids and spans.

        All texts in the first template, then all in the next.
        """
        texts = [self._within_limit((prompt or "") + text) for text in inputs]
        rows = [row for template in self.settings.templates for row in self._rows(template, texts)]
        tokens = Tokens.pad([row.ids for row in rows], "right", self.backbone.pad_id)
        span_BT = Tokens.pad([row.span for row in rows], "right").ids_BT
        return {"input_ids": tokens.ids_BT, "attention_mask": tokens.mask_BT, "span": span_BT}

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` (B, D), float32: the mean over the templates, run in turn."""
        keys = ("input_ids", "attention_mask", "span")
        parts = zip(
            *(features[key].chunk(len(self.settings.templates)) for key in keys), strict=True
        )
        features["sentence_embedding"] = torch.stack([self._pooled(*part) for part in parts]).mean(
            0
        )
        return features

    def saved(self) -> SavedBaseline:
        """What `save` writes: the LM by name and commit, how it was loaded, the settings."""
        name, loaded = self.backbone.name, self.backbone.settings
        revision = loaded.revision if loaded else None
        model = SavedModel(
            name=str(Path(name).absolute()) if Path(name).exists() else name,
            revision=hub_commit(name, revision) or revision,
            dtype=str(self.backbone.input_table.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            quantization=loaded.quantization if loaded else None,
            bos=self.backbone.bos,
        )
        longest = None if self.limit is None else self.max_seq_length
        return SavedBaseline(
            format_version=1, model=model, encoder=self.settings, max_seq_length=longest
        )

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write `baseline.yaml`; nothing of the LM is copied."""
        write_text(Path(output_path) / BASELINE_FILE, self.saved().to_yaml())

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, subfolder: str = "", device: str = "auto", **_: Any
    ) -> BaselineEncoder:
        """The encoder that `save` wrote. Raises RecipeError or BackboneError."""
        saved = read_saved(Path(model_name_or_path, subfolder, BASELINE_FILE))
        encoder = cls(load_backbone(saved.model.settings(device)), saved.encoder)
        encoder.max_seq_length = saved.max_seq_length
        return encoder

    def _pooled(self, ids_BT: Tensor, mask_BT: Tensor, span_BT: Tensor) -> Tensor:
        states_BTD = self.backbone.decoder_layer(
            self.backbone.embed(ids_BT), mask_BT, self.settings.layer
        ).float()
        return torch.einsum(
            "btd,bt->bd", states_BTD, pooling_weights(span_BT, self.settings.pooling)
        )

    def _rows(self, template: str, texts: Sequence[str]) -> list[PromptRow]:
        """Each text within the template; one that is too long is cut at its end."""
        rows = self._read(template, texts)
        return [
            row if len(row.ids) <= self.max_tokens else self._cut(template, text, row)
            for text, row in zip(texts, rows, strict=True)
        ]

    def _within_limit(self, text: str) -> str:
        """A text cut to the `limit` that was set, if one was."""
        if (
            self.limit is None
            or len(offsets := self._tokenise([text])["offset_mapping"][0]) <= self.limit
        ):
            return text
        return text[: offsets[self.limit - 1][1]]

    def _cut(self, template: str, text: str, row: PromptRow) -> PromptRow:
        ends = [end for _, end in self._tokenise([text])["offset_mapping"][0]]
        keep = len(ends)
        while (excess := len(row.ids) - self.max_tokens) > 0 and keep > 0:
            keep -= -(-excess // template.count(TEXT))
            (row,) = self._read(template, [text[: ends[keep - 1]] if keep > 0 else ""])
        return row

    def _read(self, template: str, texts: Sequence[str]) -> list[PromptRow]:
        """Each text within the template, tokenised as one string; nothing is cut."""
        filled = [
            fill(template, as_sentence(text) if self.settings.as_sentence else text)
            for text in texts
        ]
        encoded = self._tokenise([string for string, _ in filled])
        start = [] if self.backbone.bos_id is None else [self.backbone.bos_id]
        rows = []
        for (_, copies), ids, offsets in zip(
            filled, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            # Without BOS an empty text has no token at all: it gets the one that parts texts from
            # each other.
            row = [*start, *ids] or [self.backbone.tokenizer.eos_token_id or 0]
            inside = [0] * (len(row) - len(offsets)) + self._inside(offsets, copies)
            rows.append(PromptRow(row, inside if any(inside) else [0] * (len(row) - 1) + [1]))
        return rows

    def _inside(
        self, offsets: Sequence[tuple[int, int]], copies: Sequence[tuple[int, int]]
    ) -> list[int]:
        """1 for each token with a character of a copy that counts; none for `last_token`."""
        wanted = {"text": copies, "last_copy": copies[-1:], "last_token": ()}[self.settings.span]
        # A token without width stands for the character before it (tokenizers trim blanks), or for
        # the very beginning.
        return [
            int(any((a or -1) < end and min(begin, end - 1) < b for a, b in wanted))
            for begin, end in offsets
        ]

    def _tokenise(self, strings: list[str]) -> Any:
        return self.backbone.tokenizer(
            strings, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )


def pooling_weights(span_BT: Tensor, pooling: str) -> Tensor:
    """Weights of the tokens, float32 (B, T), each row's sum 1.

    Over the span alike, by place in it (SGPT), or its last token alone.
    """
    place_BT = span_BT.cumsum(1) * span_BT
    last_BT = place_BT == span_BT.sum(1, keepdim=True)
    weights_BT = {"mean": span_BT, "weighted_mean": place_BT, "last": last_BT}[pooling].float()
    return weights_BT / weights_BT.sum(1, keepdim=True)


def baseline(
    backbone: Backbone, kind: str | BaselineSettings = "mean", **changes: Any
) -> SentenceTransformer:
    """A training-free encoder as a SentenceTransformer, on the backbone's device.

    Args:
        backbone: the untouched LM.
        kind: a name, such as `prompt_eol` (docs/baselines.md), or all settings.
        changes: other settings than those of that name, such as `layer=-2`.

    Raises:
        RecipeError: no encoder of that name, an unknown setting, or a value that does not fit.
    """
    settings = variant(kind, **changes) if isinstance(kind, str) else kind
    return SentenceTransformer(
        modules=[BaselineEncoder(backbone, settings)], device=str(backbone.input_table.device)
    ).eval()


def load_saved(folder: Path, device: str | None = None) -> SentenceTransformer:
    """A saved encoder with its prompts; a folder that holds `baseline.yaml` alone will do.

    Raises:
        RecipeError, BackboneError: settings or an LM that do not fit. ModelFolderError: damaged
            prompts.
    """
    module = BaselineEncoder.load(str(folder), device=device or "auto")
    file = folder / CONFIG_FILE
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        prompts = {
            key: prompt
            for key, prompt in kept.get("prompts", {}).items()
            if isinstance(prompt, str)
        }
        model = SentenceTransformer(
            modules=[module],
            device=str(module.backbone.input_table.device),
            prompts=prompts,
            **{key: kind(kept[key]) for key, kind in SET.items() if kept.get(key) is not None},
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelFolderError(
            f"damaged: {error}", where=str(file), fix="save the encoder again"
        ) from None
    return model.eval()

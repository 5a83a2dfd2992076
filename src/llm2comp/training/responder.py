"""An LM that responds to texts: by prompt or chat template, with stock generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm2comp.errors import DataError, one_line
from llm2comp.model.backbone import Backbone
from llm2comp.model.tokens import Tokens
from llm2comp.recipe.parts import TEXT


@dataclass(frozen=True)
class ResponseOptions:
    """How to respond.

    Args:
        max_new_tokens: longest response.
        max_tokens: longest prompt, template included; the text in a longer one is cut.
        prompt: what the LM is told; holds {text}.
        chat_template: speak to the LM through its tokenizer's template; None = if it has one.
        temperature: 0 = greedy; above, tokens are drawn from the whole distribution.
        seed: of the drawing; each shard has its own sequence.
        teacher: whatever `llm2comp.load` takes; embeds the responses.
        shard_size: texts per shard, and what a stop loses at most; None = as the folder has it,
            200 in a new one.
        batch_size: texts at once.
        revision: of the model, on the Hub.
        device: None = the best there is.
    """

    max_new_tokens: int = 64
    max_tokens: int = 1024
    prompt: str = TEXT
    chat_template: bool | None = None
    temperature: float = 0.0
    seed: int = 0
    teacher: str | None = None
    shard_size: int | None = None
    batch_size: int = 16
    revision: str | None = None
    device: str | None = None


class Responder:
    """An LM that responds to texts.

    Args:
        backbone: the LM; without adapters. Its own generation settings (sampling, penalties) are
            put aside, its EOS ids kept.
        options: how to respond.

    Raises:
        DataError: a template asked for that is not there or cannot be applied; a prompt that leaves
            no room for a text.
    """

    def __init__(self, backbone: Backbone, options: ResponseOptions) -> None:
        self.backbone, self.options = backbone, options
        if options.prompt.count(TEXT) != 1:
            raise DataError(
                "no prompt",
                where="--prompt",
                expected=f"a text with {TEXT} in it, once",
                found=options.prompt,
            )
        self.template: str | None = self._template()
        lm: Any = backbone.lm
        ends = lm.generation_config.eos_token_id
        own = ends if isinstance(ends, list) else [ends]
        self.eos_ids = sorted(
            {int(end) for end in (*own, backbone.tokenizer.eos_token_id) if end is not None}
        )
        lm.generation_config = type(lm.generation_config)()
        room = (
            None
            if backbone.max_positions is None
            else backbone.max_positions - options.max_new_tokens
        )
        self.max_tokens = options.max_tokens if room is None else min(room, options.max_tokens)
        empty = len(self._tokens(""))
        if empty >= self.max_tokens:
            raise DataError(
                "no room for a text",
                where=backbone.name,
                expected=f"fewer than {self.max_tokens} tokens of prompt and template",
                found=empty,
                fix="shorten --prompt, lower --max-new-tokens or raise --max-tokens",
            )

    def respond(self, rows: Sequence[Sequence[int]]) -> tuple[list[str], int]:
        """Responses to prompts that `prompt` made, and how many tokens they are.

        Stock generation, left padding, KV cache.
        """
        backbone, options = self.backbone, self.options
        tokens = Tokens.pad(rows, "left", backbone.pad_id).to(backbone.input_table.device)
        drawing = (
            {"do_sample": True, "temperature": options.temperature, "top_k": 0}
            if options.temperature
            else {}
        )
        with torch.no_grad():
            ids_BT = backbone.lm.generate(
                input_ids=tokens.ids_BT,
                attention_mask=tokens.mask_BT,
                max_new_tokens=options.max_new_tokens,
                pad_token_id=backbone.pad_id,
                eos_token_id=self.eos_ids or None,
                use_cache=True,
                **drawing,
            )
        said = [self._until_end(row) for row in ids_BT[:, tokens.ids_BT.shape[1] :].tolist()]
        return [str(backbone.tokenizer.decode(ids, skip_special_tokens=True)) for ids in said], sum(
            map(len, said)
        )

    def prompt(self, text: str) -> tuple[list[int], bool]:
        """Token ids of what the LM is told, and whether the text was cut for them to fit."""
        ids = self._tokens(text)
        if len(ids) <= self.max_tokens:
            return ids, False
        spans = self.backbone.tokenizer(
            text, return_offsets_mapping=True, add_special_tokens=False, verbose=False
        )
        ends = [0, *(end for _, end in spans["offset_mapping"])]
        keep = len(ends) - 1
        while len(ids) > self.max_tokens:
            keep = max(0, keep - (len(ids) - self.max_tokens))
            ids = self._tokens(text[: ends[keep]])
        return ids, True

    def _tokens(self, text: str) -> list[int]:
        said = self.options.prompt.replace(TEXT, text)
        if self.template is None:
            return self.backbone.tokenise([said])[0]
        chat = self._chat(said)
        row: list[int] = self.backbone.tokenizer(chat, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        return row

    def _chat(self, said: str) -> str:
        """Through the template.

        Models that think aloud (Qwen 3) are told not to, as the paper's code does.
        """
        chat: str = self.backbone.tokenizer.apply_chat_template(
            [{"role": "user", "content": said}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        return chat

    def _template(self) -> str | None:
        backbone, asked = self.backbone, self.options.chat_template
        if asked is False or (asked is None and not backbone.tokenizer.chat_template):
            return None
        try:
            self._chat(self.options.prompt)
            return str(backbone.tokenizer.get_chat_template())
        # jinja's errors, and ValueError where there is no template or several
        except Exception as error:
            raise DataError(
                f"the chat template cannot be applied: {one_line(error, 200)}",
                where=backbone.name,
                fix="--no-chat-template",
            ) from error

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[
            : next((place for place, token in enumerate(ids) if token in self.eos_ids), len(ids))
        ]

"""Backbone: the frozen LM's three passes, its tokenizer, and its training mode."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from llm2comp.errors import BackboneError
from llm2comp.model.backbone.adapters import AdapterStack
from llm2comp.model.backbone.families import (
    attention_dropouts,
    scale_logits,
    silence_dropout,
    starting_token,
)
from llm2comp.model.backbone.frozen import Frozen
from llm2comp.model.backbone.full import FullCopy
from llm2comp.model.backbone.layout import Layout, worth_packing
from llm2comp.model.backbone.probes import possible_savings
from llm2comp.model.backbone.quantized import keep_gradients
from llm2comp.model.backbone.trainable import Trainable
from llm2comp.model.tokens import position_ids
from llm2comp.recipe import AdapterSettings, ModelSettings
from llm2comp.recipe.parts import TEXT

# What a stage may train of the LM, by `adapter.kind` of a recipe.
KINDS: dict[str, type[Trainable]] = {"lora": AdapterStack, "full": FullCopy, "none": Frozen}


class Backbone(nn.Module):
    """A causal LM, its tokenizer, and the adapters over it.

    Args:
        lm: a `...ForCausalLM` model; its weights are frozen here.
        tokenizer: its tokenizer; chat templates are never applied.
        attention: attention of the encoder pass, `bidirectional` or `causal`.
        name: where the model came from, for messages and saved settings.
        bos: what starts every text, as `model.bos` of a recipe says it.

    Raises:
        BackboneError: an LM that is not causal; no such `bos`.
    """

    def __init__(
        self,
        lm: Any,
        tokenizer: Any,
        attention: str = "bidirectional",
        name: str = "model",
        bos: str = "auto",
    ) -> None:
        super().__init__()
        if getattr(lm.config, "is_causal", True) is False:
            raise BackboneError(
                "is not a causal LM",
                where=name,
                expected="is_causal unset or true in its config",
                found="false",
            )
        self.lm = lm.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.attention = attention
        self.name = name
        self.bos = bos
        self.settings: ModelSettings | None = None  # what it was loaded by, if it was
        # of every text, for encoder and teacher alike; None: none
        self.bos_id = starting_token(tokenizer, bos, name)
        self.adapters: Trainable = AdapterStack(lm, name)
        self.copy: nn.Module | None = None
        self._dropouts = attention_dropouts(lm)
        silence_dropout(lm)
        keep_gradients(lm)
        self._dropout_on = False
        self._layout: Layout | None = None  # of the pass that runs now
        self.set_attention_dropout(0.0)

    def add_adapter(
        self, name: str, settings: AdapterSettings, dropout: float | None = None, seed: int = 0
    ) -> None:
        """What the next stage trains: one more LoRA adapter, a copy of the LM, or none of it.

        Raises:
            BackboneError: LoRA targets that match no module; two kinds over one LM; a full copy of
                a quantised LM.
        """
        kind = KINDS[settings.kind]
        if self.adapters.names and type(self.adapters) is not kind:
            raise BackboneError(
                "cannot mix kinds of adapters", where=self.name, found=settings.kind
            )
        if type(self.adapters) is not kind:
            self.adapters = kind(self.lm, self.name)
            self.copy = self.adapters.copy
            self._dropouts = attention_dropouts(self.copy or self.lm)
        self.adapters.add(name, settings, dropout, seed)

    @property
    def config(self) -> Any:
        """The LM's configuration."""
        return self.lm.config

    @property
    def input_table(self) -> Tensor:
        """Input embeddings, (V, D)."""
        table: Tensor = self.lm.get_input_embeddings().weight
        return table

    @property
    def max_positions(self) -> int | None:
        """Longest sequence that the LM was made for, memory included; None if it names none."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def embedding_scale(self) -> float:
        """What the input embedding module multiplies its rows by: 1, or √D (Gemma 3)."""
        return float(getattr(self.lm.get_input_embeddings(), "embed_scale", 1.0))

    @property
    def bos_token(self) -> str | None:
        """The token of `bos_id`."""
        bos_id = self.bos_id
        return None if bos_id is None else str(self.tokenizer.convert_ids_to_tokens(bos_id))

    @property
    def pad_id(self) -> int:
        """Id for masked places; 0 where the tokenizer has none, as it never matters."""
        value: int | None = self.tokenizer.pad_token_id
        return 0 if value is None else value

    def tokenise(self, texts: Sequence[str], max_tokens: int | None = None) -> list[list[int]]:
        """Token ids per text: BOS (if any), then the text's own, cut to `max_tokens`."""
        rows = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        start = [] if self.bos_id is None else [self.bos_id]
        return [(start + list(row))[:max_tokens] for row in rows]

    def around(self, prompt: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt before and after its {text}, each tokenised alone, without BOS."""
        if prompt == TEXT:
            return [], []
        bos = int(self.bos_id is not None)
        before, after = self.tokenise(prompt.split(TEXT))
        return before[bos:], after[bos:]

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Frozen input embeddings, x_BTD."""
        x: Tensor = self.lm.get_input_embeddings()(ids_BT)
        return x

    def encoder_pass(
        self, x_BSD: Tensor, mask_BS: Tensor, needed_BS: Tensor | None = None
    ) -> Tensor:
        """Encoder pass: adapters on; states_BSD after the final norm.

        Args:
            x_BSD: input embeddings.
            mask_BS: 1 = token, 0 = padding.
            needed_BS: bool, the states that will be used; the others may hold anything. None: all
                but padding's.
        """
        kwargs: dict[str, Any] = {"is_causal": False} if self.attention == "bidirectional" else {}
        return self._lay_out(x_BSD, mask_BS, needed_BS, **kwargs)

    def decoder_pass(
        self, x_BSD: Tensor, mask_BS: Tensor, needed_BS: Tensor | None = None
    ) -> Tensor:
        """Teacher and decoder pass: adapters off, causal, no dropout.

        Arguments and states as `encoder_pass`.
        """
        with self.base_only():
            return self._lay_out(x_BSD, mask_BS, needed_BS)

    def decoder_layer(self, x_BSD: Tensor, mask_BS: Tensor, layer: int) -> Tensor:
        """As `decoder_pass`, but states_BSD after a layer: 0 = embeddings, -1 = the final norm."""
        if layer == -1:
            return self.decoder_pass(x_BSD, mask_BS)
        with self.base_only():
            return self._run(x_BSD, position_ids(mask_BS), mask_BS, layer)

    def project(self, states_ND: Tensor) -> Tensor:
        """Frozen LM head with its scale or softcap: logits_NV (checked at load)."""
        return scale_logits(self.lm.get_output_embeddings()(states_ND), self.config)

    @contextlib.contextmanager
    def base_only(self, off: bool = True) -> Iterator[None]:
        """The untouched LM inside: adapters and dropout off (`off=False`: as an encoder pass)."""
        self._switch_dropout(self._dropout_on and not off)
        try:
            with self.adapters.switched(off):
                yield
        finally:
            self._switch_dropout(self._dropout_on and not self.adapters.off)

    def set_attention_dropout(self, p: float) -> None:
        """Dropout on the attention weights of the encoder pass, in training only.

        Raises:
            BackboneError: p > 0 and the family's attention has no such dropout.
        """
        if p > 0 and not self._dropouts:
            raise BackboneError(
                "has no attention dropout",
                where=self.name,
                fix="set attention_dropout: 0 for this stage",
            )
        self._dropout_rate = p
        for dropout in self._dropouts:
            dropout.set_rate(p)

    def set_checkpointing(self, on: bool) -> None:
        """Recompute layers in the backward pass, each with the adapter flag and layout it had."""

        def replay() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self._as_now(
                self.adapters.off, self._layout, self.adapters.body
            )

        for model in filter(None, (self.lm, self.adapters.copy)):
            if on:
                model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": replay})
            elif model.is_gradient_checkpointing:
                model.gradient_checkpointing_disable()

    @contextlib.contextmanager
    def _as_now(self, off: bool, layout: Layout | None, body: Any) -> Iterator[None]:
        with self.base_only(off), layout.apply(body) if layout else contextlib.nullcontext():
            yield

    def train(self, mode: bool = True) -> Backbone:
        """Training mode for the newest adapter's and attention's dropout; the LM stays in eval."""
        super().train(False)
        self.training = mode
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = mode
        keep_gradients(self.lm)
        self._dropout_on = mode
        self._switch_dropout(mode)
        self.adapters.train_dropout(mode)
        return self

    def _switch_dropout(self, on: bool) -> None:
        for dropout in self._dropouts:
            dropout.switch(on)

    def _lay_out(
        self, x_BSD: Tensor, mask_BS: Tensor, needed_BS: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """`_run` without what this batch need not compute."""
        packed = "packing" in self.savings and self._worth_packing(mask_BS)
        if "last layer" not in self.savings:
            needed_BS = None
        if not packed and needed_BS is None:
            return self._run(x_BSD, position_ids(mask_BS), mask_BS, **kwargs)
        self._layout = Layout.of(mask_BS, packed, needed_BS)
        try:
            with self._layout.apply(self.adapters.body):
                return self._layout.run(self._run, x_BSD, position_ids(mask_BS), **kwargs)
        finally:
            self._layout = None

    @functools.cached_property
    def savings(self) -> frozenset[str]:
        """Which of `probes.SAVINGS` this LM admits: found by a trial on first use."""
        with self.base_only():
            return possible_savings(self._run, self.input_table, self.lm.base_model)

    def _worth_packing(self, mask_BS: Tensor) -> bool:
        dropout = self._dropout_on and self._dropout_rate > 0
        window = getattr(self.config, "sliding_window", None)
        return worth_packing(mask_BS, self.input_table.dtype, dropout, window)

    def _run(
        self,
        x_BSD: Tensor,
        positions_BS: Tensor,
        mask: Tensor | None,
        layer: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        body = self.adapters.body
        if body is self.copy:
            x_BSD = x_BSD.float()
        if layer is not None:
            kwargs["output_hidden_states"] = True
        found = body(
            inputs_embeds=x_BSD,
            attention_mask=mask,
            position_ids=positions_BS,
            use_cache=False,
            **kwargs,
        )
        states: Tensor = found.last_hidden_state if layer is None else found.hidden_states[layer]
        return states

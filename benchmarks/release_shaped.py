"""The release's cost structure in our own words, with the same loss and gradients as ours: the
baseline of the training rows.

What it does on purpose, and what we do instead:
1. two full copies of the LM, one under peft for the encoder, one frozen for teacher and decoder   |
  one copy
2. eager attention                                                                                 |
  sdpa
3. logits of every position in all three passes, kept until the step ends                          |
  chunks of needed ones
4. a cross-entropy in the decoder pass whose value is dropped
  | none
5. Python loops over samples: to put memory behind a text, to cut states and logits
  | masks and gathers
6. batches as they come, padded to their longest
  | grouped by length
7. contrastive stages: two texts at a time under reentrant checkpointing
  | the batch at once

Left out, since they would change the gradient or are no matter of structure: training all input
embeddings, DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.inputs import SEED, make_lm, make_tokenizer
from benchmarks.settings import Setting
from llm2comp.model.memory import MemoryTokens

AT_ONCE = 2
TARGETS = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ReleaseShaped(nn.Module):
    """Encoder and, for stage 1 (`decoder=True`), the frozen second copy.

    Texts are rows of token ids that start with BOS.
    """

    def __init__(
        self, setting: Setting, decoder: bool, dropout: float = 0.05, attention_dropout: float = 0.0
    ) -> None:
        super().__init__()
        lm = make_lm(setting, "eager")
        config = peft.LoraConfig(
            r=16, lora_alpha=32, lora_dropout=dropout, target_modules=list(TARGETS)
        )
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            self.encoder: Any = peft.get_peft_model(lm, config)
        self.frozen: Any = make_lm(setting, "eager") if decoder else None
        self.memory = MemoryTokens.like(
            lm.get_input_embeddings().weight, setting.memory_tokens, SEED
        )
        self.memory.to(setting.device).requires_grad_(decoder)
        self.tokenizer = make_tokenizer(setting.shape)
        self.device = setting.device
        for module in lm.modules():
            if "Attention" in type(module).__name__:
                module.attention_dropout = attention_dropout

    def train(self, mode: bool = True) -> ReleaseShaped:
        """Dropout in the encoder alone."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def pretext_loss(self, rows: Sequence[Sequence[int]], sites: Sequence[int]) -> Tensor:
        """CTKD: mean over positions, then over samples."""
        contexts = [row[:site] for row, site in zip(rows, sites, strict=True)]
        continuations = [list(row[site:]) for row, site in zip(rows, sites, strict=True)]
        x, mask = self._with_memory(contexts)
        # with logits that nobody needs
        read = self.encoder(
            inputs_embeds=x,
            attention_mask=mask,
            is_causal=False,
            output_hidden_states=True,
            use_cache=False,
        )
        memory = self._cut_memory(read.hidden_states[-1], contexts)
        with torch.no_grad():
            teacher = self.frozen(input_ids=self._pad(rows), use_cache=False)
        table = self.frozen.get_input_embeddings()
        count = self.memory.count
        bos = table(torch.zeros(len(rows), 1, dtype=torch.int64, device=self.device))
        ids = self._pad(continuations)
        labels = functional.pad(ids, (count + 1, 0), value=-100)
        decoded = self.frozen(
            inputs_embeds=torch.cat([bos, memory, table(ids)], 1), labels=labels, use_cache=False
        )
        losses = []
        for i, (row, site) in enumerate(zip(rows, sites, strict=True)):
            expected = functional.log_softmax(teacher.logits[i, site - 1 : len(row)].float(), -1)
            found = functional.log_softmax(
                decoded.logits[i, count : count + 1 + len(row) - site].float(), -1
            )
            losses.append(
                functional.kl_div(found, expected, reduction="batchmean", log_target=True)
            )
        return torch.stack(losses).mean()

    def contrastive_loss(
        self, columns: Sequence[Sequence[str]], temperature: float = 0.05
    ) -> Tensor:
        """InfoNCE of the first column against all others: (view, view) in UCL, (query, positive,
        hard negative) in SCL.
        """
        queries, *documents = [self.embed_in_twos(column) for column in columns]
        scores = (
            functional.normalize(queries, dim=-1)
            @ functional.normalize(torch.cat(documents), dim=-1).T
        )
        return functional.cross_entropy(
            scores / temperature, torch.arange(len(queries), device=scores.device)
        )

    def embed_in_twos(self, texts: Sequence[str]) -> Tensor:
        """embedding_BD, every pair of texts recomputed in the backward pass, all padded to the
        batch's longest.
        """
        rows = [
            [0, *row] for row in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        ]
        width = max(map(len, rows))
        # reentrant checkpointing wants an input that learns
        anchor = torch.ones((), requires_grad=True)

        def embed(_: Tensor, start: int) -> Tensor:
            part = rows[start : start + AT_ONCE]
            x, mask = self._with_memory(part, width)
            body = self.encoder.get_base_model().model
            states = body(
                inputs_embeds=x, attention_mask=mask, is_causal=False, use_cache=False
            ).last_hidden_state
            return self._cut_memory(states, part).float().mean(1)

        parts: list[Tensor] = [
            checkpoint(embed, anchor, start, use_reentrant=True)
            for start in range(0, len(rows), AT_ONCE)
        ]
        return torch.cat(parts)

    def _pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.device)

    def _with_memory(
        self, rows: Sequence[Sequence[int]], width: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Each text, its memory right behind it, padding behind that: x_BSD, mask_BS."""
        embed, inputs, masks = self.encoder.get_input_embeddings(), [], []
        size = (width or max(map(len, rows))) + self.memory.count
        for row in rows:
            text = embed(torch.tensor(list(row), device=self.device))
            x = torch.cat([text, self.memory.vectors_KD.to(text.dtype)])
            inputs.append(functional.pad(x, (0, 0, 0, size - len(x))))
            masks.append([1] * len(x) + [0] * (size - len(x)))
        return torch.stack(inputs), torch.tensor(masks, device=self.device)

    def _cut_memory(self, states_BSD: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
        """memory_BKD."""
        return torch.stack(
            [states_BSD[i, len(row) : len(row) + self.memory.count] for i, row in enumerate(rows)]
        )

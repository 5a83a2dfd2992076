"""Memory states seen through the frozen LM: the nearest words, and what it continues with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm2comp.model.backbone import Backbone
from llm2comp.model.compressor import Compressor
from llm2comp.model.tokens import Tokens


@dataclass(frozen=True)
class Readout:
    """One text seen through its memory.

    Attributes:
        text: what was read (cut to the model's limit). words: per memory token the vocabulary
        entries that the LM head ranks first for its state, best first. from_text: the frozen LM's
        continuation of the text itself. from_memory: its continuation after the memory states,
        without the text. from_nothing: its continuation of BOS alone; empty if there is no BOS.
    """

    text: str
    words: list[list[str]]
    from_text: str
    from_memory: str
    from_nothing: str


@torch.no_grad()
def read_out(
    compressor: Compressor,
    text: str,
    max_tokens: int,
    words: int = 5,
    continuation_tokens: int = 32,
) -> Readout:
    """Look at one text through its memory states; greedy decoding.

    Args:
        compressor: encoder and frozen LM.
        text: any text.
        max_tokens: longer ones are cut, BOS included.
        words: vocabulary entries per memory token.
        continuation_tokens: length of each continuation.
    """
    backbone = compressor.backbone
    (row,) = backbone.tokenise([text], compressor.max_tokens(max_tokens))
    device = backbone.input_table.device
    tokens = Tokens.pad([row], "left").to(device)
    memory_BKD = compressor.memory_states(tokens).to(backbone.input_table.dtype)
    best_KW = backbone.project(memory_BKD[0]).topk(words, dim=-1).indices
    start = [] if backbone.bos_id is None else [backbone.bos_id]
    start_BTD = backbone.embed(torch.tensor([start], dtype=torch.int64, device=device))
    memory_BSD = torch.cat([start_BTD, memory_BKD], 1)
    x_BTD = backbone.embed(tokens.ids_BT)
    return Readout(
        text=backbone.tokenizer.decode(row, skip_special_tokens=True),
        words=[
            [backbone.tokenizer.decode([index]) for index in of_token]
            for of_token in best_KW.tolist()
        ],
        from_text=_decode(backbone, continue_greedily(backbone, x_BTD, continuation_tokens))
        if row
        else "",
        from_memory=_decode(backbone, continue_greedily(backbone, memory_BSD, continuation_tokens)),
        from_nothing=_decode(backbone, continue_greedily(backbone, start_BTD, continuation_tokens))
        if start
        else "",
    )


@torch.no_grad()
def continue_greedily(backbone: Backbone, x_BTD: Tensor, tokens: int) -> list[int]:
    """Greedy continuation of inputs (1, T, D) as token ids, until EOS or the last position."""
    room = (
        tokens
        if backbone.max_positions is None
        else min(tokens, backbone.max_positions - x_BTD.shape[1])
    )
    found: list[int] = []
    for _ in range(room):
        mask_BT = torch.ones(x_BTD.shape[:2], dtype=torch.int64, device=x_BTD.device)
        state_D = backbone.decoder_pass(x_BTD, mask_BT)[0, -1]
        best = int(backbone.project(state_D[None]).argmax())
        if best == backbone.tokenizer.eos_token_id:
            break
        found.append(best)
        x_BTD = torch.cat(
            [x_BTD, backbone.embed(torch.tensor([[best]], device=x_BTD.device)).to(x_BTD)], 1
        )
    return found


def _decode(backbone: Backbone, ids: Sequence[int]) -> str:
    text: str = backbone.tokenizer.decode(list(ids), skip_special_tokens=True)
    return text

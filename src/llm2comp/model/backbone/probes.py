"""Trials of a model on a few random tokens: what it must be able to do, and what it need not.

probe              at load: attention as asked, masked tokens left out, the head as it is known here
possible_savings   on first use: which parts of a pass can be left out without changing a state
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm2comp.errors import BackboneError
from llm2comp.model.backbone.layout import HALVES, Layout
from llm2comp.model.tokens import position_ids

if TYPE_CHECKING:
    from llm2comp.model.backbone.model import Backbone

SAVINGS = ("packing", "last layer")
PROBE_TOKENS = 6
TRIED = (2, 8)  # texts and positions
log = logging.getLogger(__name__)


@torch.no_grad()
def probe(backbone: Backbone) -> None:
    """Check on a few random tokens what the rest relies on.

    Attention is as asked and masked, and `project` gives the LM's own logits.

    Raises:
        BackboneError: an LM whose first state sees the last token, a bidirectional encoder whose
            first state ignores it, masked tokens that are not left out, or a head that does more
            than this package knows.
    """
    table = backbone.input_table
    ids = torch.randint(
        len(table), (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0)
    ).to(table.device)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + len(table) // 2) % len(table)
    mask = torch.ones_like(ids)
    kind = f"{backbone.name} (model_type {backbone.config.model_type})"
    try:
        read, decoded = (
            [run(backbone.embed(x), mask)[0] for x in (ids, other)]
            for run in (backbone.encoder_pass, backbone.decoder_pass)
        )
    except (TypeError, AttributeError) as error:
        raise BackboneError(
            f"cannot be run as this method needs: {error}",
            where=kind,
            expected="a causal LM whose layers take is_causal=False",
        ) from error
    if not all(states.isfinite().all() for states in (*read, *decoded)):
        fix = "set another model.dtype, or fetch the weights again: some are damaged"
        raise BackboneError("gives states that are not finite", where=backbone.name, fix=fix)
    # a mixture of experts groups tokens by what all of them chose, so rounding alone may move the
    # first state a little
    if _first_moves(decoded) > 4 * torch.finfo(decoded[0].dtype).eps:
        raise BackboneError(
            "is not a causal LM",
            where=kind,
            expected="a decoder-only model",
            found="the first state moves with the last token",
        )
    padded = backbone.decoder_pass(
        backbone.embed(torch.cat([other, ids], 1)), torch.cat([0 * mask, mask], 1)
    )[0, PROBE_TOKENS:]
    if torch.cosine_similarity(padded.float(), decoded[0].float(), dim=-1).mean() < 0.9:
        raise BackboneError(
            "does not leave out masked tokens, so texts cannot share a batch",
            where=kind,
            fix="choose another backbone",
        )
    if backbone.attention == "bidirectional" and _first_moves(read) <= 1e-6:
        raise BackboneError(
            "cannot encode with bidirectional attention",
            where=kind,
            found="the first state ignores the last token",
            fix="set model.attention: causal, or choose another backbone",
        )
    _check_head(backbone, ids, mask)


def _check_head(backbone: Backbone, ids: Tensor, mask: Tensor) -> None:
    """Raise BackboneError unless `project` gives the LM's own logits."""
    # padded, as the LM's own pass is: packed attention rounds otherwise in half precision
    with backbone.base_only():
        states = backbone._run(backbone.embed(ids), position_ids(mask), mask)[0]
    logits = backbone.project(states).float()
    own = backbone.lm(input_ids=ids, use_cache=False).logits[0].float()
    if logits.shape != own.shape or not torch.allclose(
        logits, own, rtol=1e-2, atol=1e-2 * own.abs().max().item()
    ):
        raise BackboneError(
            "the LM's head does more than a projection that is known here", where=backbone.name
        )


def _first_moves(states: list[Tensor]) -> float:
    """How far the first state of two texts differs, relative to its largest number."""
    first, second = (states_TD[0].float() for states_TD in states)
    return ((first - second).abs().max() / first.abs().max()).item()


@torch.no_grad()
def possible_savings(run: Callable[..., Tensor], table_VD: Tensor, body: Any) -> frozenset[str]:
    """Which of `SAVINGS` leave the states of two random texts as they are.

    Tried in a causal and in a bidirectional pass.

    Args:
        run: inputs, positions, mask, is_causal → states, the LM's body without adapters.
        table_VD: its input embeddings.
        body: the LM's body.
    """
    generator = torch.Generator().manual_seed(0)
    x_BSD = table_VD[torch.randint(len(table_VD), TRIED, generator=generator).to(table_VD.device)]
    mask_BS = torch.ones(TRIED, dtype=torch.int64, device=table_VD.device)
    mask_BS[1, : TRIED[1] // 2] = 0
    needed_BS = torch.zeros_like(mask_BS, dtype=torch.bool)
    needed_BS[:, -2:] = True
    layouts = {
        "packing": Layout.of(mask_BS, True),
        "last layer": Layout.of(mask_BS, False, needed_BS),
    }
    if body.config._attn_implementation != "sdpa":
        del layouts["packing"]
    return frozenset(
        name
        for name, layout in layouts.items()
        if _changes_nothing(layout, run, body, x_BSD, needed_BS)
    )


def _changes_nothing(
    layout: Layout, run: Callable[..., Tensor], body: Any, x_BSD: Tensor, needed_BS: Tensor
) -> bool:
    positions_BS = position_ids(layout.mask_BS)
    for kwargs in ({}, {"is_causal": False}):
        try:
            padded_ND = run(x_BSD, positions_BS, layout.mask_BS, **kwargs)[needed_BS].float()
            with layout.apply(body):
                found_ND = layout.run(run, x_BSD, positions_BS, **kwargs)[needed_BS].float()
        # a family's own code, whatever it may raise: it goes on without the saving
        except Exception as error:
            log.info("%s: computed in full (%s)", type(body).__name__, error)
            return False
        scale = padded_ND.abs().max()
        limit = 1e-4 * scale
        # rounding alone may move the states far: as far as inputs rounded once more do
        if x_BSD.dtype in HALVES:
            rounded_BSD = x_BSD * (1 + torch.finfo(x_BSD.dtype).eps)
            again_ND = run(rounded_BSD, positions_BS, layout.mask_BS, **kwargs)[needed_BS].float()
            limit = torch.maximum(5e-2 * scale, 2 * (again_ND - padded_ND).abs().max())
        if not (found_ND - padded_ND).abs().max() <= limit:
            return False
    return True


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by itself, as far as torch can tell."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in asked)

"""What a pass need not compute: padding, and what the last layer does at places that nobody reads.

A padded batch of B texts, S wide, costs B·S positions in every layer; packed one behind the other,
texts cost as many as they have tokens, N. Layers treat every position alike, except in attention:
1. take the N tokens out of the padded batch, x_1ND; positions start anew with each text
2. run the body under the attention below, which transformers looks up by its name and gives no mask
3. scaled dot products within each text alone: on CUDA in half precision by one kernel for all
   texts; else short texts are padded for this one operation, as a call per text would cost more,
   and longer ones are cut apart, without a mask
4. put the states back into their places

Of the last layer only keys and values are needed everywhere. Hooks let its other row-wise modules
(queries, attention output, MLP) see the needed rows alone and put zeros into the others, whose
states are then meaningless.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

# Below this share of padding, gathering costs more than it saves.
WORTH = 0.1
# Up to this length, texts are padded for the attention alone.
SHORT = 128
NAME = "llm2comp_packed"
HALVES = (torch.bfloat16, torch.float16)
# Modules of a layer that map each position for itself, by the names that families give them.
ROW_WISE = ("q_proj", "o_proj", "out_proj", "mlp")
_lengths: ContextVar[tuple[int, ...]] = ContextVar("lengths of the packed texts")


def worth_packing(mask_BS: Tensor, dtype: torch.dtype, dropout: bool, window: int | None) -> bool:
    """Whether a batch is computed sooner without its padding.

    Args:
        mask_BS: the padded batch.
        dtype: of the pass.
        dropout: whether attention weights are dropped out.
        window: of sliding attention, in tokens; None: every text is seen whole.
    """
    longest, tokens = int(mask_BS.sum(1).max()), int(mask_BS.sum())
    if mask_BS.is_cuda and (dtype not in HALVES or dropout):
        return False  # there is no one kernel for all texts
    if window is not None and longest > window // 2:
        return False
    # on a CPU attention of half precision is computed in float32, which only the packed form does
    halves = not mask_BS.is_cuda and dtype in HALVES
    return halves or tokens < (1 - WORTH) * mask_BS.numel()


@dataclass(frozen=True)
class Layout:
    """How one pass lays out a batch.

    Made by `of`; `apply` must be open while the body runs, and while a layer is recomputed.

    Args:
        mask_BS: the padded batch.
        lengths: tokens per text, where texts are packed; None: they stay padded.
        places_N: the tokens' places among the B·S.
        needed: rows of what the body sees, flattened, whose last state is read; None: all.
    """

    mask_BS: Tensor
    lengths: tuple[int, ...] | None
    places_N: Tensor
    needed: Tensor | None

    @classmethod
    def of(cls, mask_BS: Tensor, packed: bool, needed_BS: Tensor | None = None) -> Layout:
        """The layout of a batch, packed or padded; `needed_BS` bool, None = all."""
        places_N = mask_BS.flatten().nonzero().squeeze(1)
        needed = None
        if needed_BS is not None:
            flat = needed_BS.flatten()
            needed = (flat[places_N] if packed else flat).nonzero().squeeze(1)
        return cls(mask_BS, tuple(mask_BS.sum(1).tolist()) if packed else None, places_N, needed)

    def pack(self, x_BSD: Tensor) -> Tensor:
        """x_1ND."""
        return x_BSD.flatten(0, 1)[self.places_N][None]

    def unpack(self, states_1ND: Tensor) -> Tensor:
        """states_BSD, zero at padding."""
        (rows, size), width = self.mask_BS.shape, states_1ND.shape[-1]
        return (
            states_1ND.new_zeros(rows * size, width)
            .index_copy(0, self.places_N, states_1ND[0])
            .view(rows, size, width)
        )

    def run(
        self, body: Callable[..., Tensor], x_BSD: Tensor, positions_BS: Tensor, **kwargs: Any
    ) -> Tensor:
        """States of a padded batch, states_BSD; `body` takes inputs, positions and mask."""
        if self.lengths is None:
            return body(x_BSD, positions_BS, self.mask_BS, **kwargs)
        positions_1N = positions_BS.flatten()[self.places_N][None]
        return self.unpack(body(self.pack(x_BSD), positions_1N, None, **kwargs))

    @contextlib.contextmanager
    def apply(self, body: Any) -> Iterator[None]:
        """Inside, the body computes by this layout."""
        with contextlib.ExitStack() as stack:
            if self.lengths is not None:
                token, before = _lengths.set(self.lengths), body.config._attn_implementation
                body.config._attn_implementation = NAME
                stack.callback(_lengths.reset, token)
                stack.callback(setattr, body.config, "_attn_implementation", before)
            if self.needed is not None:
                for module in _row_wise(body):
                    for handle in _only_rows(module, self.needed):
                        stack.callback(handle.remove)
            yield


def _row_wise(body: nn.Module) -> list[nn.Module]:
    """Modules of the last layer that may compute some rows alone."""
    layer = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)][
        -1
    ]
    return [module for name, module in layer.named_modules() if name.rpartition(".")[2] in ROW_WISE]


def _only_rows(module: nn.Module, rows: Tensor) -> tuple[Any, Any]:
    """Hooks: a module maps these rows of its (..., D) input alone, and gives 0 for the others."""
    shape: list[int] = []

    def take(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shape[:] = args[0].shape[:-1]
        return args[0].flatten(0, -2)[rows][None], *args[1:]

    def put(_: nn.Module, __: Any, found_1ND: Tensor) -> Tensor:
        width = found_1ND.shape[-1]
        every = found_1ND.new_zeros(math.prod(shape), width)
        return every.index_copy(0, rows, found_1ND[0]).view(*shape, width)

    return module.register_forward_pre_hook(take), module.register_forward_hook(put)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, over packed texts.

    query is (1, heads, N, head width); key and value likewise.

    Raises:
        ValueError: something of the family's that changes scores (softcap, sinks, position bias)
            and is not known here.
    """
    changing = [
        name for name in ("softcap", "s_aux", "position_bias") if unknown.get(name) is not None
    ]
    if changing or attention_mask is not None:
        raise ValueError(f"packed attention knows no {', '.join(changing) or 'mask'}")
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    lengths = _lengths.get()
    if query.is_cuda and query.dtype in HALVES and not dropout:
        return _one_kernel(query, key, value, lengths, causal, scaling), None
    dtype = query.dtype
    # there float32 is the faster, its backward twice
    if query.device.type == "cpu" and dtype in HALVES:
        query, key, value = query.float(), key.float(), value.float()
    kind: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if max(lengths) <= SHORT:
        found_1HNW = _padded_for_attention(query, key, value, lengths, causal, kind)
    else:
        parts = zip(
            query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True
        )
        attend = functional.scaled_dot_product_attention
        found_1HNW = torch.cat([attend(q, k, v, is_causal=causal, **kind) for q, k, v in parts], 2)
    return found_1HNW.transpose(1, 2).contiguous().to(dtype), None


def _padded_for_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    kind: dict[str, Any],
) -> Tensor:
    """One call for all texts, each padded at its end: (1, H, N, W) → (1, H, N, W).

    H heads of width W.

    A causal pass needs no mask: what a token sees stands before it. What padding sees is thrown
    away.
    """
    longest, device = max(lengths), query.device
    lengths_B1 = torch.tensor(lengths, device=device)[:, None]
    real_BT = torch.arange(longest, device=device) < lengths_B1
    same = bool(min(lengths) == longest)
    places_N = real_BT.flatten().nonzero().squeeze(1)

    def spread(x_1HNW: Tensor) -> Tensor:
        x_NHW = x_1HNW[0].transpose(0, 1)
        if not same:
            x_NHW = x_NHW.new_zeros(real_BT.numel(), *x_NHW.shape[1:]).index_copy(
                0, places_N, x_NHW
            )
        return x_NHW.reshape(*real_BT.shape, *x_NHW.shape[1:]).transpose(1, 2)

    sees_B1TT = None if causal or same else real_BT[:, None, None].expand(-1, -1, longest, -1)
    q, k, v = spread(query), spread(key), spread(value)
    found_BHTW: Tensor = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=sees_B1TT, is_causal=causal, **kind
    )
    found_NHW = found_BHTW.transpose(1, 2).flatten(0, 1)
    return (found_NHW if same else found_NHW[places_N]).transpose(0, 1)[None]


def _one_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    causal: bool,
    scaling: float | None,
) -> Tensor:
    """All texts in one call of flash attention, (1, N, heads, head width)."""
    repeats = query.shape[1] // key.shape[1]
    states = [query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)]
    ends = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    attend: Any = varlen.varlen_attn
    # torch 2.11 and later; before that `is_causal`
    windowed = "window_size" in inspect.signature(attend).parameters
    kind: dict[str, Any] = (
        {"window_size": (-1, 0 if causal else -1)} if windowed else {"is_causal": causal}
    )
    rows = [x[0].transpose(0, 1).contiguous() for x in states]
    found_NHD: Tensor = attend(*rows, ends, ends, max(lengths), max(lengths), scale=scaling, **kind)
    return found_NHD[None]


AttentionInterface.register(NAME, packed_attention)

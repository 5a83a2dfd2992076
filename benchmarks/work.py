"""Matrix work of a step by formula, and the rate at which the machine multiplies matrices of these
shapes.

Model FLOPs: multiply-adds count 2, padding counts nothing, nothing is recomputed, the last layer
counts in full though ours leaves out rows that nobody reads, elementwise work is left out. With T
text tokens in all, texts of S positions, L layers, D hidden, F intermediate, h·H = width of all
heads, h·H' of key or value, r rank:

    layers, forward    P = 2·T·L·(2·D·hH + 2·D·hH' + 3·D·F)
    attention, forward A = 4·L·hH·Σ S²                      (scores and values; a causal pass counts
      in full)
    LoRA, forward      R = 2·T·L·r·Σ (in + out) over q, v, o, gate, up, down
    head, forward      H = 2·N·D·V at N positions

A backward pass through frozen layers needs only the gradient of the input: P again, 2·A for
attention, 2·R for LoRA (input and weights), H for the head. Pretext: encoder forward and backward
with LoRA on contexts with memory, teacher forward on texts, decoder forward and backward on BOS,
memory, continuation, and the head three times on the compared positions. MFU = model FLOPs / time /
GEMM rate.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from benchmarks.settings import Shape

RANK = 16


def _linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """(in, out) of a layer's seven products."""
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    d, f = shape.hidden, shape.intermediate
    return {
        "q": (d, wide),
        "k": (d, narrow),
        "v": (d, narrow),
        "o": (wide, d),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }


def body_flops(
    shape: Shape, lengths: Sequence[int], lora: bool = False, backward: bool = False
) -> float:
    """Layers, attention and LoRA over texts of so many positions each."""
    linears, tokens = _linears(shape), sum(lengths)
    products = 2.0 * tokens * shape.layers * sum(i * o for i, o in linears.values())
    attention = (
        4.0 * shape.layers * shape.heads * shape.head_dim * sum(length**2 for length in lengths)
    )
    adapters = (
        2.0
        * tokens
        * shape.layers
        * RANK
        * sum(i + o for name, (i, o) in linears.items() if name != "k")
        * lora
    )
    return products * (1 + backward) + (attention + adapters) * (1 + 2 * backward)


def pretext_flops(
    shape: Shape, lengths: Sequence[int], sites: Sequence[int], memory: int, bos: bool = True
) -> float:
    """One CTKD step on texts of `lengths` split at `sites`."""
    continuations = [length - site for length, site in zip(lengths, sites, strict=True)]
    encoder = body_flops(shape, [site + memory for site in sites], lora=True, backward=True)
    teacher = body_flops(shape, lengths)
    decoder = body_flops(shape, [bos + memory + length for length in continuations], backward=True)
    positions = sum(continuations) + len(continuations)
    return encoder + teacher + decoder + 3 * 2.0 * shape.hidden * shape.vocabulary * positions


def contrastive_flops(shape: Shape, lengths: Sequence[int], memory: int) -> float:
    """Encoder forward and backward on all views or columns of a batch."""
    return body_flops(shape, [length + memory for length in lengths], lora=True, backward=True)


def encode_flops(shape: Shape, lengths: Sequence[int], memory: int) -> float:
    """Encoder forward with merged adapters, no head."""
    return body_flops(shape, [length + memory for length in lengths])


def synchronise(device: str) -> None:
    """Wait for what runs on an accelerator."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class Gemm:
    """The products of one layer and of the head at `positions` rows; `rate()` times each and weighs
    the layer's by L.
    """

    def __init__(self, shape: Shape, positions: int, dtype: torch.dtype, device: str) -> None:
        self.device = device
        sizes = [(shape.layers, *size) for size in _linears(shape).values()] + [
            (1, shape.hidden, shape.vocabulary)
        ]
        self.products = [
            (
                count,
                torch.randn(positions, inner, device=device).to(dtype),
                torch.randn(outer, inner, device=device).to(dtype),
            )
            for count, inner, outer in sizes
        ]
        self.rate()  # warm-up

    def rate(self) -> float:
        """FLOP/s."""
        flops = seconds = 0.0
        for count, x, weight in self.products:
            synchronise(self.device)
            begin = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            synchronise(self.device)
            seconds += count * (time.perf_counter() - begin)
            flops += count * 2.0 * x.shape[0] * x.shape[1] * weight.shape[0]
        return flops / seconds

"""What a row compares: sides that do the same work in other ways, and the targets held against
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.settings import Setting

LEAST_LOSS = 1e-3


@dataclass(frozen=True)
class Side:
    """One way to do a row's work, built and ready.

    Args:
        run: do one timed unit; returns its tokens (padding not counted) and its model FLOPs (0: no
            MFU).
        check: what this side computes, to be held against the base side; called once, before
            anything learns.
        dtype: of its matrix products.
    """

    run: Callable[[], tuple[int, float]]
    check: Callable[[], list[Tensor]] | None = None
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Target:
    """A figure of the issue: `figure` is ratio (of tokens/s to the base), memory (ratio of peaks),
    mfu, peak_gib, or ms (of one token or question).
    """

    setting: str
    side: str
    figure: str
    sense: str  # ">=" or "<="
    limit: float


@dataclass(frozen=True)
class Row:
    """One comparison.

    Args:
        about: what is measured, for the report.
        sides: name → builder from (setting, folder of `prepare`); the order is that of the table.
        base: the side that ratios are taken to.
        differ: error between what a side and the base computed.
        limits: most that it may be: both in float32; one of them in half precision.
        memory: sides whose peak memory is measured.
        timed: False: memory alone.
        gemm_rows: positions of the GEMM whose rate stands below the MFU; 0: no MFU.
    """

    about: str
    sides: Mapping[str, Callable[[Setting, Path], Side]]
    base: str
    targets: Sequence[Target] = ()
    differ: Callable[[list[Tensor], list[Tensor]], float] | None = None
    limits: tuple[float, float] = (0.0, 0.0)
    memory: Sequence[str] = ()
    timed: bool = True
    gemm_rows: Callable[[Setting], int] = lambda _: 0
    prepare: Callable[[Setting, Path], None] | None = None


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest |found − expected| / |expected|; infinite where the expected is zero or a tensor is
    missing.

    A loss (a tensor of one number) counts as `LEAST_LOSS` at least: next to 0 it is rounding alone;
    its gradient tells more.
    """
    if len(found) != len(expected):
        return float("inf")
    pairs = [
        (a.detach().float().cpu(), b.detach().float().cpu())
        for a, b in zip(found, expected, strict=True)
    ]
    sizes = [b.norm().clamp_min(LEAST_LOSS if b.ndim == 0 else 0.0) for _, b in pairs]
    return max(
        ((a - b).norm() / size).item() if size > 0 else float("inf")
        for (a, b), size in zip(pairs, sizes, strict=True)
    )


def cosine_gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """1 − the lowest cosine between texts' embeddings."""
    cosines = [
        torch.cosine_similarity(a.double(), b.double(), dim=-1).min()
        for a, b in zip(found, expected, strict=True)
    ]
    return 1.0 - torch.stack(cosines).min().item()

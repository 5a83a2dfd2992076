"""The spectrum of a set of embeddings, and what is read off it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm2comp.errors import DataError


def spectrum(embeddings_ND: ArrayLike) -> NDArray[np.float64]:
    """Singular values of the embeddings' covariance, largest first, (D,) (arXiv 2110.09348).

    Mean-centred, not normalised.

    Raises:
        DataError: fewer than two embeddings, or one that is not finite.
    """
    x = finite_vectors(embeddings_ND, least=2)
    if len(x) > x.shape[1]:
        return np.linalg.svd(np.atleast_2d(np.cov(x, rowvar=False, bias=True)), compute_uv=False)
    # the same, ten times as fast for wide vectors
    few = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2 / len(x)
    few[-1] = 0.0  # centred rows sum to 0, so one direction is lost
    return np.pad(few, (0, x.shape[1] - len(few)))


def effective_rank(values_D: ArrayLike) -> float:
    """exp(−Σ p_i ln p_i), p_i = σ_i / Σσ (Roy & Vetterli 2007); between 1 and D.

    `values_D` as from `spectrum`.
    """
    sigma = np.asarray(values_D, dtype=np.float64)
    if sigma.sum() <= 0:
        return 1.0
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def participation_ratio(values_D: ArrayLike) -> float:
    """(Σσ)² / Σσ², between 1 and D; 1 without any spread, as `effective_rank`.

    `values_D` as from `spectrum`.
    """
    sigma = np.asarray(values_D, dtype=np.float64)
    if sigma.sum() <= 0:
        return 1.0
    p = sigma / sigma.sum()
    return float(1 / (p**2).sum())


def count_above(values_D: ArrayLike, share: float = 0.01) -> int:
    """Directions with σ_i ≥ share · σ_1; 0 without any spread. `values_D` as from `spectrum`."""
    sigma = np.asarray(values_D, dtype=np.float64)
    largest = sigma.max(initial=0.0)
    return int((sigma >= share * largest).sum()) if largest > 0 else 0


def finite_vectors(
    vectors: ArrayLike, shape: str = "(N, D)", least: int = 1, where: str | None = None
) -> NDArray[np.float64]:
    """The vectors in float64.

    DataError: another shape, fewer rows than `least`, or a number that is not finite.
    """
    x = np.asarray(vectors, dtype=np.float64)
    if x.ndim != shape.count(",") + 1 or len(x) < least or x.size == 0:
        raise DataError(
            "vectors too few or of another shape",
            where=where,
            expected=f"shape {shape} with N ≥ {least}",
            found=f"shape {x.shape}",
        )
    refuse(np.logical_not(np.isfinite(x).all(-1)), "a vector is not finite", where)
    return x


def refuse(bad: NDArray[np.bool_], problem: str, where: str | None = None) -> None:
    """Raise a DataError that names the first bad row, if there is one.

    It names the memory token, too, if `bad` is (N, K).
    """
    if bad.any():
        place = ", ".join(
            f"{name} {i}"
            for name, i in zip(("row", "memory token"), np.argwhere(bad)[0], strict=False)
        )
        raise DataError(
            problem,
            where=where,
            found=f"{place}, {bad.sum()} in all",
            fix="leave it out or embed it anew",
        )

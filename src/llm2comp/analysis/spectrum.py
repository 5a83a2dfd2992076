"""The spectrum of a set of embeddings, and what is read off it (METHOD 4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llm2comp.errors import DataError


def spectrum(embeddings_ND: ArrayLike) -> NDArray[np.float64]:
    """Singular values of the embeddings' covariance, largest first, (D,) (Jing et al., arXiv 2110.09348).

    Mean-centred, not normalised.

    Raises:
        DataError: fewer than two embeddings, or one that is not finite.
    """
    x = np.asarray(embeddings_ND, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise DataError("no spectrum", expected="two or more embeddings, shape (N, D)", found=x.shape)
    if not np.isfinite(x).all():
        rows = np.flatnonzero(~np.isfinite(x).all(1))
        raise DataError("an embedding is not finite", found=f"row {rows[0]}, {len(rows)} in all")
    covariance = np.cov(x, rowvar=False, bias=True)
    return np.linalg.svd(np.atleast_2d(covariance), compute_uv=False)


def effective_rank(values_D: ArrayLike) -> float:
    """exp(−Σ p_i ln p_i), p_i = σ_i / Σσ (Roy & Vetterli 2007); between 1 and D. `values_D` as from `spectrum`."""
    sigma = np.asarray(values_D, dtype=np.float64)
    if sigma.sum() <= 0:
        return 1.0
    p = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(p * np.log(p)).sum()))
